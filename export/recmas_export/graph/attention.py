"""How a Hugging Face decoder is made to attend over a static cache, without code per architecture.

Three extension points of transformers are used and nothing else: the attention interface (one
ONNX `Attention` per layer), the mask interface (the model's own mask rule, evaluated at each
sample's own positions) and the cache class (one ONNX `TensorScatter` per tensor).

Shape legend: B samples, S new positions, C cache rows, H query heads, K key/value heads, D head
width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from recmas_compiler.lowering.static_cache import StaticRows, ragged_mask
from recmas_export.passes.tidy import OPSET
from recmas_runtime.core.errors import fail

IMPLEMENTATION = "recmas_portable"

# What models pass to every attention implementation and what has no effect here: dropout is off in
# evaluation, windows and causality are in the explicit mask, positions are in the rotated keys.
_WITHOUT_EFFECT = frozenset({"dropout", "is_causal", "position_ids", "sliding_window", "use_cache"})


def _attention(
    module: torch.nn.Module,
    query_BHSD: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    mask_B1SC: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Attend over the whole cache under an explicit boolean mask: the attention interface."""
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - _WITHOUT_EFFECT)
    if unknown or mask_B1SC is None:
        what = f"attention with {', '.join(unknown)}" if unknown else "attention without a mask"
        raise fail(
            "RM300",
            f"{type(module).__name__} uses {what}, which the portable graph has no operator for.",
            hint="Use a backbone with standard causal attention.",
        )
    scale = float(query_BHSD.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    attrs = {"scale": scale} if not softcap else {"scale": scale, "softcap": float(softcap)}
    out_BHSD = torch.onnx.ops.symbolic(
        "Attention",
        (query_BHSD, key_BKCD, value_BKCD, mask_B1SC),
        attrs,
        dtype=query_BHSD.dtype,
        shape=(*query_BHSD.shape[:3], value_BKCD.shape[-1]),
        version=OPSET,
    )
    return out_BHSD.transpose(1, 2), None


class PortableLayer(StaticRows):
    """One layer of a static cache whose rows are written by ONNX's `TensorScatter`."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new rows and return the whole cache."""
        self.keys = self._scatter(self.keys, key_states)
        self.values = self._scatter(self.values, value_states)
        return self.keys, self.values

    def _scatter(self, cache_BKCD: torch.Tensor, new_BKSD: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache_BKCD, new_BKSD, self.write_index),
            {"axis": 2, "mode": "linear"},
            dtype=cache_BKCD.dtype,
            shape=cache_BKCD.shape,
            version=OPSET,
        )


def portable_cache(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], write_index: torch.Tensor
) -> Any:
    """Return a transformers cache over the given rows, one pair [B, K, C, D] per layer."""
    return Cache(
        layers=[PortableLayer(k, v, write_index) for k, v in zip(keys, values, strict=True)]
    )


@contextmanager
def portable_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make `model` use the portable attention and masks inside the block, and its own after it."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ragged_mask)
    configs = {
        id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)
    }.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if any(config._attn_implementation != IMPLEMENTATION for config in configs):
            raise fail(
                "RM300",
                f"{type(model).__name__} does not take its attention from transformers' interface.",
                hint="Use a backbone whose transformers implementation has attention backends.",
            )
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
