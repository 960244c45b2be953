"""Every numeric tolerance of training, each with its reason. Nothing else defines one."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

# Limits in float32 unless they say otherwise.
TOLERANCES: Final = MappingProxyType(
    {
        # Two ways to the same loss, relative. Batches, padding, kept keys and values, and the order
        # of a batch change only the rounding: 1e-6 measured.
        "loss_relative": 1e-5,
        # A parameter's gradient, relative to its largest entry: rounding of twice the depth.
        "gradient_relative": 1e-4,
        # Generated thoughts and messages, absolute: rounding feeds back from step to step.
        "latent_absolute": 1e-4,
        # Compiled kernels fuse and reorder what eager ones do one by one.
        "compiled_loss_relative": 1e-4,
        "compiled_gradient_relative": 1e-3,
        # Central differences in float64 with steps of 1e-4, relative to the largest entry of the
        # parameter; the rounding of the difference comes on top.
        "finite_difference_relative": 1e-5,
    }
)
