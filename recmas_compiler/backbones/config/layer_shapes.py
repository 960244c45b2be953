"""What each layer of a backbone keeps, told from the entries of its config.

Families name the sizes of keys and values in a few ways; the rules below go by these names and not
by architecture. What a loaded model really keeps is in `own_layers`, and the two must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recmas_compiler.backbones.config.entries import count
from recmas_compiler.backbones.config.layer_types import LAYER_KINDS, STATEFUL
from recmas_compiler.backbones.config.state_shapes import state_shapes
from recmas_runtime.formats.layers import LayerShape, RowsShape


def layer_shapes(
    values: Mapping[str, Any],
    types: Sequence[str],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[LayerShape, ...]:
    """Return what the layers of a config keep.

    Args:
        values: Its entries, with what its family fills in.
        types: The type of each layer, of those that are known.
        num_heads: Query heads.
        num_kv_heads: Key/value heads where nothing else is said.
        head_dim: Their width, likewise.
    """
    usual = RowsShape(
        heads=num_kv_heads,
        key_width=head_dim,
        value_width=count(values, "v_head_dim") or head_dim,
    )
    shapes = {"full": _full(values, usual), "sliding": _sliding(values, usual)}
    if count(values, "kv_lora_rank"):
        # Latent attention: what keys and values are computed from is kept, for all heads at once,
        # and the part of the keys that is rotated.
        shapes["full"] = RowsShape(
            heads=1,
            key_width=count(values, "kv_lora_rank"),
            value_width=count(values, "qk_rope_head_dim") or head_dim,
        )
    # The last layers of some models attend over the rows of an earlier one.
    num_own = len(types) - count(values, "num_kv_shared_layers")
    states = () if STATEFUL.isdisjoint(types) else state_shapes(values)
    return tuple(
        LayerShape(
            rows=_own(values, i, shapes.get(LAYER_KINDS[name])) if i < num_own else None,
            states=states if name in STATEFUL else (),
        )
        for i, name in enumerate(types)
    )


def _own(values: Mapping[str, Any], layer: int, usual: RowsShape | None) -> RowsShape | None:
    """Return a layer's rows where a config has entries for it alone."""
    all_own = values.get("per_layer_config")
    own = all_own.get(str(layer)) if isinstance(all_own, dict) else None
    if usual is None or not isinstance(own, dict):
        return usual
    width = count(own, "head_dim")
    return RowsShape(
        heads=count(own, "num_key_value_heads") or usual.heads,
        key_width=width or usual.key_width,
        value_width=width or usual.value_width,
    )


def _full(values: Mapping[str, Any], usual: RowsShape) -> RowsShape:
    """Return the rows of layers that attend to everything, where sliding ones have other heads."""
    width = count(values, "global_head_dim")
    if not width:
        return usual
    heads = usual.heads
    if values.get("attention_k_eq_v") is True:
        heads = count(values, "num_global_key_value_heads") or heads
    return RowsShape(heads=heads, key_width=width, value_width=width)


def _sliding(values: Mapping[str, Any], usual: RowsShape) -> RowsShape:
    key_width = count(values, "swa_head_dim") or usual.key_width
    return RowsShape(
        heads=count(values, "swa_num_key_value_heads") or usual.heads,
        key_width=key_width,
        value_width=count(values, "swa_v_head_dim") or usual.value_width,
    )
