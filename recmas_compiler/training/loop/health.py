"""Notices when training goes wrong: a loss that is no number, or one that runs away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# The mean over about the last twenty steps is what is judged: single batches differ.
_KEPT: Final = 0.95
# A loss this many times its best mean, and more by this much, does not come back.
_FACTOR: Final = 3.0
_MARGIN: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Health:
    """The running mean of the loss and the lowest it has been; None before the first step."""

    mean: float | None = None
    lowest: float | None = None

    def after(self, loss: float) -> Health:
        """Return the state after one more step."""
        mean = loss if self.mean is None else _KEPT * self.mean + (1 - _KEPT) * loss
        lowest = mean if self.lowest is None else min(self.lowest, mean)
        return Health(mean=mean, lowest=lowest)

    def why_stop(self, loss: float, gradient_norm: float) -> str | None:
        """Return what is wrong with the step just taken, `loss` being part of it; None if nothing.

        Args:
            loss: Of the step.
            gradient_norm: Over all links.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient is {gradient_norm}"
        after = self.after(loss)
        assert after.mean is not None
        assert after.lowest is not None
        if after.mean > _FACTOR * after.lowest + _MARGIN:
            return f"the loss diverges: its mean rose from {after.lowest:.3g} to {after.mean:.3g}"
        return None
