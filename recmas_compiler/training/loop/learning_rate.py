"""The learning rate of every step."""

from __future__ import annotations

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup_steps: int) -> float:
    """Return the rate of a step: a linear rise to `peak`, then half a cosine's cycle to zero.

    Args:
        step: From 0.
        steps: All steps of the stage.
        peak: The highest rate.
        warmup_steps: Steps of the rise.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
