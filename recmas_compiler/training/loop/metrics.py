"""What a loop leaves in its folder besides checkpoints: figures of every step, costs, a picture.

`metrics.jsonl` has an object per step and per measurement; the others are read off it, so that the
parts of a resumed run count together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, mean, median
from typing import Any, Final

import torch
from torch import nn

from recmas_compiler.analysis.plots import COLOURS, Panel, save_figure
from recmas_compiler.training.loop.distributed import World
from recmas_runtime.checking.machine import peak_resident_bytes
from recmas_runtime.core.files import write_whole
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.text import first_line

METRICS_NAME: Final = "metrics.jsonl"
COST_NAME: Final = "cost.json"
CURVES_NAME: Final = "curves.png"

_FIGURES: Final = ("latent", "null", "shuffled", "mean", "cosine", "alone", "given texts")
_ROUNDS: Final = ("-", "--", ":", "-.")
# Wider running means would hide the beginning.
_SMOOTHED_OVER: Final = 20

Entries = Sequence[Mapping[str, Any]]


class MetricsError(Exception):
    """A metrics file that holds something else than a loop writes; the text says what."""


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory so far in MiB: of the GPU if one is used, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_resident_bytes() / 2**20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a loop took.

    Attributes:
        step_seconds: Median over the steps; measurements and checkpoints are not in it.
        tokens_per_step: Mean number of tokens with a loss.
        peak_memory_mb: Most memory of a process in MiB, measurements and loading included: of the
            GPU if one is used, else of the whole process.
    """

    trainable_parameters: int
    steps: int
    step_seconds: float
    total_seconds: float
    tokens_per_step: float
    peak_memory_mb: float
    processes: int
    device: str


def write_cost(folder: Path, learning: Mapping[str, nn.Module], world: World) -> None:
    """Write beside a loop's metrics what they say about its cost, if anything."""
    steps = _entries(folder, "step")
    if not steps:  # the file was lost after the last one
        return
    seconds = [entry["tokens"] / entry["tokens_per_s"] for entry in steps]
    cost = Cost(
        trainable_parameters=sum(w.numel() for m in learning.values() for w in m.parameters()),
        steps=len(steps),
        step_seconds=median(seconds),
        total_seconds=sum(seconds),
        tokens_per_step=mean(entry["tokens"] for entry in steps),
        peak_memory_mb=max(entry["memory_mb"] for entry in steps),
        processes=world.size,
        device=world.device.type,
    )
    text = json.dumps(asdict(cost), indent=1)
    write_whole(folder / COST_NAME, text + "\n")


def read_cost(folder: Path) -> Cost:
    """Return what `write_cost` left in a loop's folder."""
    return Cost(**json.loads((folder / COST_NAME).read_bytes()))


def read_costs(folder: Path) -> dict[str, Cost]:
    """Return what every loop in a run's folder took, by its own folder; not what is damaged."""
    costs = {}
    for path in sorted(folder.glob(f"**/{COST_NAME}")):
        with suppress(OSError, ValueError, TypeError, RecursionError):  # an earlier loop's
            costs[str(path.parent.relative_to(folder))] = read_cost(path.parent)
    return costs


def draw_curves(
    folder: Path, *, title: str, levels: Mapping[str, float] | None = None
) -> Path | None:
    """Draw loss, gradient norms and learning rate over the steps, beside a loop's metrics.

    Args:
        levels: Held-out figures to draw as horizontal lines, by name.

    Returns:
        The picture; None without matplotlib, or without a single step.
    """
    steps = _entries(folder, "step")
    if not steps:
        return None
    panels: list[Panel] = [partial(_draw_loss, steps, _entries(folder, "eval"), levels or {})]
    panels.append(partial(_draw_gradients, steps, "grad_norm", "by link, before clipping"))
    if "round_grad_norm" in steps[-1]:
        how = "at a link's output, by round"
        panels.append(partial(_draw_gradients, steps, "round_grad_norm", how))
    panels.append(partial(_draw_rates, steps))
    path = folder / CURVES_NAME
    return path if save_figure(path, panels, panel_size=(4.3, 5), title=title) else None


def _draw_loss(steps: Entries, measured: Entries, levels: Mapping[str, float], axes: Any) -> None:
    places, losses = _column(steps, "step"), _column(steps, "loss")
    axes.plot(places, losses, color="#999999", alpha=0.35, linewidth=0.8)
    axes.plot(places, _smoothed(losses), color="#999999", label="training loss")
    axes.set_ylabel("loss per token")
    names = [name for name in _FIGURES if any(name in entry for entry in measured)]
    # Baselines are cosines too: neither belongs on the axis of losses.
    is_cosine = bool(levels) or names == ["cosine"]
    figures = axes.twinx() if is_cosine else axes
    for colour, name in zip(COLOURS, names, strict=False):
        found = [entry for entry in measured if name in entry]
        places, values = _column(found, "step"), _column(found, name)
        figures.plot(places, values, "o-", color=colour, ms=3, label=f"held out: {name}")
    for colour, (name, level) in zip(COLOURS[1:], levels.items(), strict=False):
        figures.axhline(level, color=colour, linestyle="--", linewidth=1, label=name)
    if is_cosine:
        figures.set_ylabel("held-out cosine")
        figures.spines["top"].set_visible(False)
    _finish(axes, [*axes.get_lines()[1:], *(figures.get_lines() if is_cosine else ())])


def _draw_gradients(steps: Entries, name: str, how: str, axes: Any) -> None:
    keys = list(steps[-1][name])
    # The same colours in every panel; links that do not learn come after those that do.
    links = list(dict.fromkeys([*steps[-1]["grad_norm"], *(key.partition("@")[0] for key in keys)]))
    for key in keys:
        link_id, _, round_ = key.partition("@")
        axes.plot(
            _column(steps, "step"),
            _smoothed([entry[name].get(key, 0.0) for entry in steps]),
            color=COLOURS[links.index(link_id) % len(COLOURS)],
            linestyle=_ROUNDS[(int(round_ or 1) - 1) % len(_ROUNDS)],
            label=key,
        )
    if any(norm > 0 for norm in steps[-1][name].values()):
        axes.set_yscale("log")
    axes.set_ylabel(f"gradient norm {how}")
    _finish(axes, axes.get_lines())


def _draw_rates(steps: Entries, axes: Any) -> None:
    axes.plot(_column(steps, "step"), _column(steps, "lr"), color=COLOURS[0])
    axes.set_ylabel("learning rate")
    _finish(axes, ())


def _finish(axes: Any, lines: Sequence[Any]) -> None:
    """Name the steps, and list the lines below the panel, where they cover nothing."""
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.3)
    if lines:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
        axes.legend(handles=lines, ncols=2, frameon=False, fontsize=8, **place)


def _smoothed(values: Sequence[float]) -> list[float]:
    width = max(1, min(_SMOOTHED_OVER, len(values) // 10))
    return [fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]


def _entries(folder: Path, kind: str) -> list[Mapping[str, Any]]:
    """Return the entries of a kind.

    Raises:
        MetricsError: The file holds something else than a loop writes.
    """
    try:
        return [e for e in read_json_lines(folder / METRICS_NAME) if e["kind"] == kind]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MetricsError(first_line(error)) from error


def _column(entries: Entries, name: str) -> list[float]:
    return [entry[name] for entry in entries]
