"""How many parameters a model has, counted from its config.

The layers of a mixture of experts hold many MLPs, of which a token takes a few: all of them are in
memory. Families call them differently, but not more differently than the names below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from recmas_compiler.backbones.config.entries import as_count
from recmas_runtime.formats.layers import StateShape

_HOW_MANY: Final = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_HOW_WIDE: Final = ("moe_intermediate_size", "intermediate_size")
_TAKEN: Final = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
_SHARED: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH: Final = ("shared_expert_intermediate_size", "shared_intermediate_size")
_DENSE_AT_FIRST: Final = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")

# The matrices of a gated MLP.
_MATRICES: Final = 3


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model.

    Attributes:
        num_layers: Layers that have experts in place of an MLP.
        num_each: Experts that a token can choose in each of them.
        num_taken: Experts that a token takes.
        width: Hidden width of each.
        shared_width: Hidden width of what every token takes beside them; 0 for nothing.
    """

    num_layers: int
    num_each: int
    num_taken: int
    width: int
    shared_width: int


def experts_of(values: Mapping[str, Any], num_layers: int) -> Experts | None:
    """Return the experts that the entries of a config describe; None for a model without."""
    num_each = _first(values, _HOW_MANY)
    if num_each < 2 or values.get("enable_moe_block") is False:
        return None
    width = _first(values, _HOW_WIDE)
    shared = _first(values, _SHARED) * width or _first(values, _SHARED_WIDTH)
    return Experts(
        num_layers=_layers_with_experts(values, num_layers),
        num_each=num_each,
        num_taken=min(_first(values, _TAKEN) or 1, num_each),
        width=width,
        shared_width=shared,
    )


def count_parameters(
    *,
    width: int,
    num_attending: int,
    num_mlps: int,
    state_parameters: int,
    attention_width: int,
    kv_width: int,
    mlp_width: int,
    vocab_size: int,
    is_tied: bool,
    experts: Experts | None = None,
) -> int:
    """Return the parameters of a decoder with gated MLPs, all experts included.

    Exact for Llama, Mistral and Phi-3. Families with biases or more norms have a few more, by less
    than one in a thousand.

    Args:
        num_attending: Layers with attention.
        num_mlps: Layers with an MLP, or with experts.
        state_parameters: Those of layers that keep a state, beside their MLPs.
    """
    attention = num_attending * (2 * width * attention_width + 2 * width * kv_width)
    tables = vocab_size * width * (1 if is_tied else 2)
    if experts is not None:
        num_mlps = max(num_mlps - experts.num_layers, 0)
    norms = 2 * width * max(num_attending, num_mlps)
    layers = attention + state_parameters + norms + num_mlps * _MATRICES * width * mlp_width
    if experts is not None:
        router = width * experts.num_each
        shared = _MATRICES * width * experts.shared_width
        layers += experts.num_layers * (router + shared) + count_expert_parameters(experts, width)
    return layers + width + tables


def count_state_parameters(states: Sequence[StateShape], width: int) -> int:
    """Return the parameters of a layer with such states: what goes into them and comes out.

    A convolution's channels, a gate and the output of its heads, two numbers for each head. What
    some families have more, of low rank, is left out.
    """
    found = {state.name: state.shape for state in states}
    if not found:
        return 0
    channels, kept = found["conv"]
    # of a convolution alone: two gates and the output
    heads, inner = 0, channels * 3 // 2
    if "recurrent" in found:
        heads, *_, last = found["recurrent"]
        # where every channel is a head, what it is given is of low rank
        heads, inner = (0, channels) if heads == channels else (heads, heads * last)
    return width * (channels + 2 * inner + 2 * heads) + channels * (kept + 1)


def count_expert_parameters(experts: Experts, width: int) -> int:
    """Return the parameters of the experts that tokens choose among, of a model of a width."""
    return experts.num_layers * experts.num_each * _MATRICES * width * experts.width


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first entry that is a count, or begins with one; 0 where there is none."""
    for name in names:
        found = values.get(name)
        number = as_count(found[0] if isinstance(found, list) and found else found)
        if number:
            return number
    return 0


def _layers_with_experts(values: Mapping[str, Any], num_layers: int) -> int:
    kinds = values.get("mlp_layer_types")
    if isinstance(kinds, list) and kinds:
        return min(num_layers, len([kind for kind in kinds if kind != "dense"]))
    plain = values.get("mlp_only_layers")
    left_out = set(plain) if isinstance(plain, list) else set()
    period, offset = values.get("expert_layer_period"), values.get("expert_layer_offset")
    if isinstance(period, int) and period > 0 and isinstance(offset, int):
        return len(range(offset, num_layers, period))
    every = _first(values, ("decoder_sparse_step", "moe_layer_interval")) or 1
    first = _first(values, _DENSE_AT_FIRST)
    layers = (n for n in range(first, num_layers) if n not in left_out and (n + 1) % every == 0)
    return len(list(layers))
