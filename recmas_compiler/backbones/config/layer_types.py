"""The types of a config's layers: listed by it, told by other entries, or those of its family.

As with sizes, the rules go by how families call such entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from recmas_runtime.formats.layers import MOST_LAYERS

AttentionKind = Literal["full", "sliding", "linear", "none"]

# How a layer type of a config attends. A layer that keeps a state instead of keys and values is
# "linear" here, one that does not look at other positions at all is "none".
LAYER_KINDS: Final[Mapping[str, AttentionKind]] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    # A position sees those of its own chunk: a rule of positions as a window is.
    "chunked_attention": "sliding",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
    "recurrent": "linear",
    "conv": "linear",
    "hybrid": "full",
    "moe": "none",
    "mlp": "none",
}
# Types of layers that keep a state; a "hybrid" one attends too.
STATEFUL: Final = frozenset(
    {"hybrid"} | {name for name, kind in LAYER_KINDS.items() if kind == "linear"}
)

# The letters of a pattern, as in the files of Nemotron-H.
_LETTERS: Final = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def layer_types(
    values: Mapping[str, Any], num_layers: int | None, cycle: list[str] | None
) -> list[Any] | None:
    """Return the types of a config's layers; None if it does not tell, nor its family.

    Args:
        values: Its entries, with what its family fills in.
        num_layers: Their number; None where the list of types says it.
        cycle: What repeats over the depth in its family; empty where only the config can tell.
    """
    for name in ("layer_types", "layers_block_type"):
        if values.get(name) is not None:
            listed = values[name]
            return listed if isinstance(listed, list) else []
    pattern = values.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [_LETTERS.get(letter, letter) for letter in pattern]
    if num_layers is None:
        return None
    told = _by_index(values, num_layers)
    if told is not None:
        return told
    if cycle == []:
        return None
    return _repeated(values, num_layers, cycle or ["sliding_attention"])


def _by_index(values: Mapping[str, Any], num_layers: int) -> list[str] | None:
    """Return types where a config names the layers that attend, all others keeping a state."""
    own = values.get("linear_attn_config")
    first, attending, other = 0, values.get("attn_layer_indices"), "linear_attention"
    if isinstance(own, dict):
        first, attending = 1, own.get("full_attn_layers")
    elif "full_attn_idxs" in values:
        attending, other = values["full_attn_idxs"], "conv"
    if isinstance(attending, list):
        return ["full_attention" if i + first in attending else other for i in range(num_layers)]
    sparse = values.get("sparse_attention_config")
    chosen = sparse.get("sparse_attention_freq") if isinstance(sparse, dict) else None
    if isinstance(chosen, list):
        return ["minimax_m3_sparse" if has else "full_attention" for has in chosen]
    every, offset = values.get("attn_layer_period"), values.get("attn_layer_offset")
    if isinstance(every, int) and isinstance(offset, int) and every > 0:
        return [
            "full_attention" if i % every == offset else "linear_attention"
            for i in range(num_layers)
        ]
    return None


def _repeated(values: Mapping[str, Any], num_layers: int, cycle: list[str]) -> list[str]:
    for key, usual in (
        ("sliding_window_pattern", "sliding_attention"),
        ("full_attention_interval", "linear_attention"),
        ("layer_group_size", "linear_attention"),
    ):
        every = values.get(key)
        if isinstance(every, int) and every > 0:
            cycle = [usual] * (min(every, MOST_LAYERS + 1) - 1) + ["full_attention"]
    if "sliding_attention" in cycle:
        first = values.get("max_window_layers")
        if values.get("sliding_window") is None or values.get("use_sliding_window") is False:
            cycle = ["full_attention"]
        elif isinstance(first, int):
            return [
                "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)
            ]
    return [cycle[i % len(cycle)] for i in range(num_layers)]
