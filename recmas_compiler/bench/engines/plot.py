"""The picture of `recmasc bench engines`: time of a step, and the floor, by batch and capacity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recmas_compiler.bench.engines.report import EngineReport, EngineRow
from recmas_compiler.bench.plot import COLOURS


def draw_engines(report: EngineReport, path: Path) -> bool:
    """Draw the time of a step, one panel for each batch and number of used rows.

    Returns:
        Whether there is a picture: not without matplotlib, and not without steps.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for row in report.rows if "step_ms" in row.figures]
    panels = sorted({(row.cell.batch, row.cell.used) for row in rows})
    if not panels:
        return False
    figure = Figure(figsize=(4.8 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (batch, used) in zip(axes, panels, strict=True):
        _draw(axis, [row for row in rows if (row.cell.batch, row.cell.used) == (batch, used)])
        axis.set_title(f"batch {batch}, {used} rows used", fontsize="medium")
    axes[0].set_ylabel("ms per latent step (log scale); dashed: its floor")
    figure.suptitle(f"{report.about['machine']['cpu']}, {report.about['threads']} threads")
    figure.savefig(path, dpi=150)
    return True


def _draw(axis: Any, rows: Sequence[EngineRow]) -> None:
    """Draw a bar for each engine and capacity, and the floor of its precision across it."""
    labels = []
    names = list(dict.fromkeys(_name(row) for row in rows))
    for place, row in enumerate(rows):
        step = row.figures["step_ms"]
        colour = COLOURS[names.index(_name(row)) % len(COLOURS)]
        axis.bar(place, step.median, color=colour)
        error = [[step.median - step.min], [step.max - step.median]]
        axis.errorbar(place, step.median, yerr=error, fmt="none", ecolor="black", capsize=2)
        floor = row.figures["floor_ms"].median
        axis.hlines(floor, place - 0.45, place + 0.45, colors="black", linestyles="--")
        capacity = "" if row.cell.capacity is None else f"\n{row.cell.capacity}"
        labels.append(f"{_name(row)}{capacity}")
    axis.set_xticks(range(len(rows)), labels, fontsize="x-small", rotation=45, ha="right")
    axis.set_yscale("log")
    axis.spines[["top", "right"]].set_visible(False)


def _name(row: EngineRow) -> str:
    return f"{row.worker.key.engine} {row.worker.about['precision']}"
