"""The cost table for programs and for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from recmas_compiler.bench.training_costs import RowResult, TrainingCosts
from recmas_runtime.running.controls import SHUFFLED

_NOTHING: Final = "-"
_EXACT: Final = "Right is a held-out target that greedy decoding would write letter for letter."


def costs_json(costs: TrainingCosts) -> dict[str, Any]:
    """Return the table for programs."""
    rate = costs.options.hourly_rate
    return {
        "hourly_rate": rate,
        "interrupted": costs.interrupted,
        "rows": [{**asdict(row), "price": row.price(rate)} for row in costs.rows],
    }


def costs_markdown(costs: TrainingCosts) -> str:
    """Return the table for people, with what has to be known to read it."""
    rate = costs.options.hourly_rate
    head = ["system", "learns", "parameters", "memory", "s/step", "steps", "time"]
    head += [] if rate is None else [f"price at {rate:g} an hour"]
    head += ["held-out loss", "with others' messages", "right (95 %)"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(_cells(row, rate, len(head)))} |" for row in costs.rows]
    notes = [
        "Loss is in nats per token of the answer, with generated thoughts and texts. Memory is the "
        "most of the training's own process; time is all of that process, with that of the row it "
        "starts from.",
        _EXACT
        if costs.options.data is None
        else f"Right is by the protocol {costs.options.protocol}, asked of built bundles.",
    ]
    notes += [f"Not run: {row.title}: {row.why_not}." for row in costs.rows if not row.is_done]
    if costs.interrupted:
        notes.append("Stopped before the end. Go on with the same command and --resume.")
    return "\n".join([*lines, "", *notes])


def _cells(row: RowResult, rate: float | None, num: int) -> list[str]:
    if not row.is_done:
        return [row.title, row.learns or _NOTHING, "not run", *[_NOTHING] * (num - 3)]
    price = row.price(rate)
    own, *_ = row.losses.values() or [None]
    cells = [
        row.title,
        row.learns or _NOTHING,
        _shown(row.trainable_parameters, ","),
        _shown(row.peak_memory_mb, ",.0f", " MiB"),
        _shown(row.step_s, ".3g"),
        _shown(row.steps, ","),
        _time(row.wall_s) if row.learns else _NOTHING,
    ]
    cells += [] if rate is None else [_shown(price, ".4g")]
    cells += [_shown(own, ".4f"), _shown(row.losses.get(SHUFFLED), ".4f"), _right(row)]
    return cells


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return _NOTHING if value is None else f"{value:{form}}{unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _right(row: RowResult) -> str:
    found = row.accuracy
    if found is None:
        return _NOTHING
    return (
        f"{found['right']:g} of {found['of']}, {found['share']:.1%} "
        f"({found['low']:.1%} to {found['high']:.1%})"
    )
