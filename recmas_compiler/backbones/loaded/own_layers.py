"""What the layers of a loaded model keep of a sequence, found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_head import body_of
from recmas_runtime.formats.layers import LayerShape, RowsShape, StateShape, state_name

_NUM_POSITIONS = 2


@torch.no_grad()
def layers_of(model: Any) -> tuple[LayerShape, ...]:
    """Return what each layer of a causal model keeps after a few positions have run."""
    body = body_of(model)
    ids = torch.zeros(1, _NUM_POSITIONS, dtype=torch.long)
    embeds = model.get_input_embeddings()(ids)
    cache = DynamicCache(config=model.config.get_text_config())
    body(inputs_embeds=embeds, **with_cache(body, cache))
    return tuple(
        LayerShape(rows=_rows(layer), states=tuple(_states(layer))) for layer in cache.layers
    )


def _rows(layer: Any) -> RowsShape | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() < 4:  # a layer that nothing was written to
        return None
    return RowsShape(heads=keys.shape[1], key_width=keys.shape[-1], value_width=values.shape[-1])


def _states(layer: Any) -> Iterator[StateShape]:
    """Yield states by number: a convolution keeps what its next position sees of those before."""
    for kind, taken in (("conv", 1), ("recurrent", 0)):
        for number, state in getattr(layer, f"{kind}_states", {}).items():
            if state is not None:
                *outer, last = state.shape[1:]
                shape = (*outer, last - taken)
                yield StateShape(name=state_name(kind, number), shape=shape)
