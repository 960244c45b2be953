"""Gradients through a model that loops its own layers, of all passes and not of the last ones."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_whole_gradients(model: Any) -> Any:
    """Have a model's gradients go through every pass over its layers; returns the model.

    HRM computes the early passes of each cycle without gradients, in evaluation too, as it was
    pretrained: what learns in front of it would see a part of its effect only. Outputs are the
    same.
    """
    modules: list[Any] = [part for part in model.modules() if isinstance(part, nn.Module)]
    for part in modules:
        if hasattr(part, "L_bp_cycles_padded"):
            config = part.config
            part.L_bp_cycles_padded = [config.L_cycles] * config.H_cycles
    return model
