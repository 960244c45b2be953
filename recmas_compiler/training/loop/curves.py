"""The picture of a stage: loss, gradient norms and learning rate over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from recmas_compiler.training.loop.metrics import METRICS_NAME, read_metrics

CURVES_NAME: Final = "curves.png"

# Okabe and Ito's colours, which people with colour blindness tell apart.
_COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip
_FIGURES: Final = ("latent", "null", "shuffled", "mean", "cosine", "alone")
_ROUNDS: Final = ("-", "--", ":", "-.")
# Wider running means would hide the beginning.
_SMOOTHED_OVER: Final = 20


def draw_curves(
    folder: Path, *, title: str, levels: Mapping[str, float] | None = None
) -> Path | None:
    """Draw the metrics in `folder` beside them.

    Args:
        folder: Of a stage.
        title: Above the picture.
        levels: Held-out figures to draw as horizontal lines, by name.

    Returns:
        The picture; None without matplotlib, or without a single step.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = list(read_metrics(folder / METRICS_NAME))
    steps = [entry for entry in entries if entry["kind"] == "step"]
    measured = [entry for entry in entries if entry["kind"] == "eval"]
    if not steps:
        return None
    has_rounds = "round_grad_norm" in steps[-1]
    # Not pyplot: it keeps figures and picks a window system.
    figure = Figure(figsize=(17 if has_rounds else 13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4 if has_rounds else 3)
    _draw_loss(panels[0], steps, measured, levels or {})
    _draw_gradients(panels[1], steps, "grad_norm")
    panels[1].set_ylabel("gradient norm by link, before clipping")
    if has_rounds:
        _draw_gradients(panels[2], steps, "round_grad_norm")
        panels[2].set_ylabel("gradient norm at a link's output, by round")
    rates = [entry["lr"] for entry in steps]
    panels[-1].plot([entry["step"] for entry in steps], rates, color=_COLOURS[0])
    panels[-1].set_ylabel("learning rate")
    for axes in panels:
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(title)
    path = folder / CURVES_NAME
    figure.savefig(path, dpi=130)
    return path


def _draw_loss(
    axes: Any,
    steps: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    levels: Mapping[str, float],
) -> None:
    places = [entry["step"] for entry in steps]
    losses = [entry["loss"] for entry in steps]
    axes.plot(places, losses, color="#999999", alpha=0.35, linewidth=0.8)
    axes.plot(places, _smoothed(losses), color="#999999", label="training loss")
    axes.set_ylabel("loss per token")
    names = [name for name in _FIGURES if any(name in entry for entry in measured)]
    is_cosine = names == ["cosine"]
    figures = axes.twinx() if is_cosine else axes
    for number, name in enumerate(names):
        found = [(entry["step"], entry[name]) for entry in measured if name in entry]
        colour = _COLOURS[number]
        figures.plot(*zip(*found, strict=True), "o-", color=colour, ms=3, label=f"held out: {name}")
    for number, (name, level) in enumerate(levels.items(), start=1):
        figures.axhline(level, color=_COLOURS[number], linestyle="--", linewidth=1, label=name)
    lines = [*axes.get_lines()[1:], *(figures.get_lines() if is_cosine else ())]
    if is_cosine:
        figures.set_ylabel("held-out cosine")
        figures.spines["top"].set_visible(False)
    _legend(axes, lines)


def _draw_gradients(axes: Any, steps: Sequence[Mapping[str, Any]], name: str) -> None:
    places = [entry["step"] for entry in steps]
    keys = list(steps[-1][name])
    # The same colours in every panel; links that do not learn come after those that do.
    links = list(dict.fromkeys([*steps[-1]["grad_norm"], *(key.partition("@")[0] for key in keys)]))
    for key in keys:
        link_id, _, round_ = key.partition("@")
        axes.plot(
            places,
            _smoothed([entry[name].get(key, 0.0) for entry in steps]),
            color=_COLOURS[links.index(link_id) % len(_COLOURS)],
            linestyle=_ROUNDS[(int(round_ or 1) - 1) % len(_ROUNDS)],
            label=key,
        )
    if any(norm > 0 for norm in steps[-1][name].values()):
        axes.set_yscale("log")
    _legend(axes, axes.get_lines())


def _legend(axes: Any, lines: Sequence[Any]) -> None:
    """List the lines below the panel, where they cover nothing."""
    axes.legend(
        handles=lines,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
        frameon=False,
        fontsize=8,
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    width = max(1, min(_SMOOTHED_OVER, len(values) // 10))
    return [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        if (part := values[max(0, end - width) : end])
    ]
