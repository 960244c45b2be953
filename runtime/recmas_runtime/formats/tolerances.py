"""Every numeric tolerance of the project, each with its reason. Nothing else defines one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from recmas_runtime.formats.manifest import LossEntry

# Limits in float32. "Relative" compares max |difference| with max |expected|: hidden states are
# taken after the final norm, where entries differ in size by orders of magnitude.
TOLERANCES: Final = MappingProxyType(
    {
        # Input embeddings: a table lookup and at most one multiplication.
        "embeds_relative": 1e-6,
        # One backbone call on equal inputs, max |difference| / max |expected|. Two correct float32
        # implementations of 30 layers differ by rounding only: 1e-6 to 1e-5 measured.
        "hidden_relative": 1e-4,
        # A link on equal inputs: three matrix products, the same bound with less depth.
        "link_relative": 1e-5,
        # Logits on equal hidden states: one matrix product of width d.
        "logits_relative": 1e-5,
        # Messages of whole programs, absolute, after rounds x steps of free-running recursion.
        # Rounding differences feed back through the recursion, so this is looser than one step.
        "message_absolute": 1e-3,
        # The attention probe has an answer that is exact in float32 but for the softmax.
        "probe_absolute": 1e-6,
    }
)

# What differs where weights are quantized: the reference is still the float32 model. Such a figure
# tells a kernel that computes something else (errors of 1 and more, or no number at all) from
# rounding, which random and small models show most; what a precision costs, LOSS_LIMITS say.
_QUANTIZED_TOLERANCES: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        # A weight is off by half of 1/128 of its block's largest: 3e-3 measured for the tables of
        # SmolLM2, 3e-2 after its 30 layers, 1e-2 where the head rounds its input too. Small and
        # random models reach three times that.
        "int8": MappingProxyType(
            {"embeds_relative": 1e-2, "hidden_relative": 0.2, "logits_relative": 3e-2}
        ),
        # As above with 1/8 in the layers: 0.27 measured. Tables have 8 bits.
        "int4": MappingProxyType(
            {"embeds_relative": 1e-2, "hidden_relative": 0.8, "logits_relative": 3e-2}
        ),
    }
)

# What a precision may cost, by the names of `loss_figures`; a build that loses more fails. SmolLM2,
# with 135M parameters among the models that lose most, costs 0.001, 0.04 and 0.008 nats in int8,
# 0.03, 0.19 and 0.13 in int4. Limits are a multiple of that: beyond them something is broken for a
# model, or it is no use in this precision.
LOSS_LIMITS: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        "int8": MappingProxyType(
            {"1 - hidden cosine": 0.01, "1 - greedy agreement": 0.15, "loss increase": 0.05}
        ),
        "int4": MappingProxyType(
            {"1 - hidden cosine": 0.12, "1 - greedy agreement": 0.4, "loss increase": 0.4}
        ),
    }
)


def tolerances(precision: str) -> Mapping[str, float]:
    """Return the tolerances of a backbone's precision, by the names of `TOLERANCES`."""
    return {**TOLERANCES, **_QUANTIZED_TOLERANCES.get(precision, {})}


def loss_figures(loss: LossEntry) -> dict[str, float]:
    """Return what a precision costs, each figure the smaller the better and 0 for nothing lost."""
    return {
        "1 - hidden cosine": 1 - loss.hidden_cosine,
        "1 - greedy agreement": 1 - loss.greedy_agreement,
        "loss increase": loss.loss - loss.reference_loss,
    }
