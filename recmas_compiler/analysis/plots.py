"""Pictures of reports: the look that all of them share, drawn without a window system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

# Okabe and Ito's colours, which people with colour blindness tell apart.
COLOURS: Final = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
)  # fmt: skip

Panel = Callable[[Any], None]
"""Draws into the matplotlib axes that it gets."""


def save_figure(
    path: Path,
    panels: Sequence[Panel],
    *,
    panel_size: tuple[float, float],
    title: str,
    footnote: str = "",
) -> bool:
    """Draw panels side by side into a PNG file.

    Args:
        panels: From left to right; without any there is no picture.
        panel_size: Width and height of a panel, in inches.

    Returns:
        Whether there is a picture: not without matplotlib, and not without panels.
    """
    try:
        # Not pyplot: it keeps figures and picks a window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not panels:
        return False
    width, height = panel_size
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, draw in zip(all_axes, panels, strict=True):
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    if footnote:
        figure.supxlabel(footnote, fontsize="x-small")
    figure.savefig(path, dpi=150)
    return True
