"""Measured figures against what their precision allows: the one comparison of build and verify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from recmas_runtime.formats.manifest import LossEntry
from recmas_runtime.formats.precisions import PRECISIONS

# In float32; those of the other precisions are in their rows too, each with its reason.
TOLERANCES: Final = PRECISIONS["float32"].tolerances


def beyond_tolerance(figures: Mapping[str, float], *, precision: str) -> Iterator[str]:
    """Yield what is wrong with each figure that is not within its tolerance.

    Args:
        figures: By the names of `TOLERANCES`; one that is not a number is beyond.
        precision: Whose tolerances count.
    """
    allowed = PRECISIONS[precision].tolerances
    for name, value in figures.items():
        if not value <= allowed[name]:
            yield f"{name} is {value:.2e}, allowed is {allowed[name]:.0e}"


def beyond_loss_limits(loss: LossEntry, *, precision: str) -> Iterator[str]:
    """Yield what is wrong with each figure of a loss that a precision must not reach."""
    figures = loss_figures(loss)
    for name, limit in PRECISIONS[precision].loss_limits.items():
        if not figures[name] <= limit:
            yield (
                f"{name} of {precision} is {figures[name]:.3g} over {loss.text}, "
                f"allowed is {limit:g}"
            )


def loss_figures(loss: LossEntry) -> dict[str, float]:
    """Return what a precision costs, each figure the smaller the better and 0 for nothing lost."""
    return {
        "1 - hidden cosine": 1 - loss.hidden_cosine,
        "1 - greedy agreement": 1 - loss.greedy_agreement,
        "loss increase": loss.loss - loss.reference_loss,
    }
