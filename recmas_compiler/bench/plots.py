"""The pictures of `recmasc bench`: systems by rounds and steps, engines by batch and capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_compiler.analysis.plots import COLOURS, save_figure
from recmas_runtime.bench.report import PAPER, PAPER_SOURCE, BenchReport, Row, Spread
from recmas_runtime.core.text import counted
from recmas_runtime.running.baselines import LATENT

if TYPE_CHECKING:
    from recmas_compiler.bench.engine_report import EngineReport, EngineRow

_WIDTH_OF_A_GROUP: Final = 0.8


def draw_report(report: BenchReport, path: Path) -> bool:
    """Draw time and tokens per question by rounds, and time by latent steps where they vary.

    Returns False, without a picture, where matplotlib or figures are missing.
    """
    rows = report.figures.rows
    if not rows:
        return False
    swept = _swept(rows)
    by_rounds = [row for row in rows if row not in swept[1:]]
    panels = [partial(_time_by_rounds, by_rounds), partial(_tokens_by_rounds, by_rounds)]
    if swept:
        panels.append(partial(_time_by_steps, swept, rows))
    interrupted = ", interrupted" if report.interrupted else ""
    questions = counted(report.figures.questions, "question")
    return save_figure(
        path,
        panels,
        panel_size=(5.2, 4.4),
        title=f"{report.about['name']}, {questions}{interrupted}; "
        "labels: against the text system of the same rounds",
        footnote=f"paper: {PAPER_SOURCE}; its own models and hardware",
    )


def _swept(rows: Sequence[Row]) -> list[Row]:
    """Return the latent rows that differ in their steps alone, the one as built first."""
    latent = [row for row in rows if row.case.name == LATENT]
    most_rounds = max(row.case.rounds for row in latent)
    found = [row for row in latent if row.case.rounds == most_rounds]
    return found if len(found) > 1 else []


def _time_by_rounds(rows: Sequence[Row], axes: Any) -> None:
    _bars(axes, rows, lambda row: Spread.of(row.cost.seconds), lambda row: _labels(row)[0])
    axes.set_ylabel("seconds per question")
    axes.legend(frameon=False, fontsize="small")


def _tokens_by_rounds(rows: Sequence[Row], axes: Any) -> None:
    _bars(
        axes, rows, lambda row: Spread.of([row.cost.generated_tokens]), lambda row: _labels(row)[1]
    )
    axes.set_ylabel("generated tokens per question")


def _bars(
    axes: Any,
    rows: Sequence[Row],
    height: Callable[[Row], Spread],
    label: Callable[[Row], tuple[str, str]],
) -> None:
    """Draw groups of bars by rounds; a label over a bar, and under the latent one the paper's."""
    names = list(dict.fromkeys(row.case.name for row in rows))
    rounds = sorted({row.case.rounds for row in rows})
    width = _WIDTH_OF_A_GROUP / len(names)
    papers = dict.fromkeys(rounds, "")
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        mine = [row for row in rows if row.case.name == name]
        offset = (names.index(name) - (len(names) - 1) / 2) * width
        places = [rounds.index(row.case.rounds) + offset for row in mine]
        spreads = [height(row) for row in mine]
        middles = [spread.median for spread in spreads]
        axes.bar(places, middles, width, color=colour, label=name)
        if any(spread.min < spread.max for spread in spreads):
            axes.errorbar(
                places, middles, yerr=_errors(spreads), fmt="none", ecolor="black", capsize=2
            )
        for row, place, spread in zip(mine, places, spreads, strict=True):
            ours, paper = label(row)
            papers[row.case.rounds] = papers[row.case.rounds] or paper
            axes.annotate(
                ours, (place, spread.max), (0, 3), ha="center", fontsize="small",
                textcoords="offset points",
            )  # fmt: skip
    axes.set_xticks(
        range(len(rounds)), [f"{counted(count, 'round')}\n{papers[count]}" for count in rounds]
    )
    axes.margins(y=0.12)


def _labels(row: Row) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return speed-up and share of tokens saved, each beside the paper's."""
    if row.comparison is None:
        return ("", ""), ("", "")
    times = saved = ""
    if row.case.name == LATENT and row.case.rounds in PAPER:
        speed_up, reduction = PAPER[row.case.rounds]
        times, saved = f"paper: {speed_up:.1f} x", f"paper: {-reduction:+.1%}"
    compared = row.comparison
    ours = f"{compared.speed_up.median:.1f} x", f"{-compared.token_reduction:+.0%}"
    return (ours[0], times), (ours[1], saved)


def _time_by_steps(swept: Sequence[Row], rows: Sequence[Row], axes: Any) -> None:
    """Draw time by latent steps, and the text system's beside it."""
    ordered = sorted(swept, key=lambda row: row.case.latent_steps)
    steps = [row.case.latent_steps for row in ordered]
    spreads = [Spread.of(row.cost.seconds) for row in ordered]
    axes.errorbar(
        steps,
        [spread.median for spread in spreads],
        yerr=_errors(spreads),
        fmt="o-",
        color=COLOURS[0],
        capsize=3,
        label=LATENT,
    )
    rounds = ordered[0].case.rounds
    text = next((r for r in rows if r.case.writes_handover and r.case.rounds == rounds), None)
    if text is not None:
        seconds = Spread.of(text.cost.seconds).median
        axes.axhline(seconds, color=COLOURS[1], linestyle="--", label=text.case.name)
    axes.set_xlabel(f"latent steps, {counted(rounds, 'round')}")
    axes.set_ylabel("seconds per question")
    axes.set_xticks(steps)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")


def draw_engines(report: EngineReport, path: Path) -> bool:
    """Draw the time of a step, one panel for each batch and number of used rows.

    Returns False, without a picture, where matplotlib or steps are missing.
    """
    rows = [row for row in report.rows if "step_ms" in row.figures]
    panels = sorted({(row.cell.batch, row.cell.used) for row in rows})
    return save_figure(
        path,
        [partial(_steps, rows, batch, used) for batch, used in panels],
        panel_size=(4.8, 4.2),
        title=f"{report.about['machine']['cpu']}, {report.about['threads']} threads",
    )


def _steps(all_rows: Sequence[EngineRow], batch: int, used: int, axes: Any) -> None:
    """Draw a bar for each engine and capacity, and the floor of its precision across it."""
    rows = [row for row in all_rows if (row.cell.batch, row.cell.used) == (batch, used)]
    names = list(dict.fromkeys(_name(row) for row in rows))
    labels = []
    for place, row in enumerate(rows):
        step = row.figures["step_ms"]
        colour = COLOURS[names.index(_name(row)) % len(COLOURS)]
        axes.bar(place, step.median, color=colour)
        axes.errorbar(
            place, step.median, yerr=_errors([step]), fmt="none", ecolor="black", capsize=2
        )
        floor = row.figures["floor_ms"].median
        axes.hlines(floor, place - 0.45, place + 0.45, colors="black", linestyles="--")
        capacity = "" if row.cell.capacity is None else f"\n{row.cell.capacity}"
        labels.append(f"{_name(row)}{capacity}")
    axes.set_xticks(range(len(rows)), labels, fontsize="x-small", rotation=45, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("ms per latent step (log scale); dashed: its floor")
    axes.set_title(f"batch {batch}, {used} rows used", fontsize="medium")


def _name(row: EngineRow) -> str:
    return f"{row.worker.key.engine} {row.worker.about['precision']}"


def _errors(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return error bars from the least to the most, about the median."""
    return [[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]]
