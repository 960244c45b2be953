"""How many parameters a model has, counted from its config.

The layers of a mixture of experts hold many MLPs, of which a token takes a few: all of them are in
memory. Families call sizes differently, but not more differently than the names below; what no
entry of a config tells is in a table of families. A test holds the count against a model of every
type that runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from recmas_compiler.backbones.config.entries import as_count, count, first_count
from recmas_compiler.backbones.config.layer_types import LAYER_KINDS, AttentionKind
from recmas_runtime.formats.layers import LayerShape, RowsShape, StateShape

_HOW_MANY: Final = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_HOW_WIDE: Final = ("moe_intermediate_size", "intermediate_size")
_TAKEN: Final = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"),
    "top_k_experts",
)
_SHARED: Final = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH: Final = (
    *("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"),
    "shared_intermediate_size",
)
_DENSE_AT_FIRST: Final = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_EVERY: Final = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
# An MLP's width, in layers beside those with experts where it has a name of its own there.
_BESIDE: Final = (
    *("dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"),
)
_MLP_WIDTH: Final = ("intermediate_size", "ffn_dim", "n_inner", "dff", "ffn_hidden_size")


@dataclass(frozen=True, kw_only=True)
class _Code:
    """What the code of a family says about its parameters.

    Attributes:
        matrices: Those of an MLP and of an expert: 3 with a gate, 0 where layers have none.
        gates_attention: Whether what heads return is gated: matrices as wide as queries.
        has_positions: Whether positions have embeddings.
        num_shared: Experts that every token takes where no entry of its configs says so.
        halves: Whether an MLP is half as wide as its entry says.
        from_both: Whether layers with attention are one, and read the embeddings besides.
        in_stacks: Whether it has two stacks of layers that are run many times.
        chooses_heads: Whether the experts include queries and outputs of attention.
        head_matrices: Matrices before its table of tokens, as wide as the model.
    """

    matrices: int = 3
    gates_attention: bool = False
    has_positions: bool = False
    num_shared: int = 0
    halves: bool = False
    from_both: bool = False
    in_stacks: bool = False
    chooses_heads: bool = False
    head_matrices: int = 0


_WITHOUT_GATE: Final = _Code(matrices=2)
_WITH_POSITIONS: Final = _Code(matrices=2, has_positions=True)
_GATED: Final = _Code(gates_attention=True)
_USUAL: Final = _Code()
_CODE: Final[Mapping[str, _Code]] = {
    **dict.fromkeys(("apertus", "arcee", "bloom", "codegen", "ctrl", "falcon"), _WITHOUT_GATE),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese", "gptj", "jais2", "nanochat"), _WITHOUT_GATE),
    **dict.fromkeys(("nemotron", "nemotron_h", "persimmon", "phi", "starcoder2"), _WITHOUT_GATE),
    **dict.fromkeys(("fuyu", "xglm"), _WITHOUT_GATE),
    **dict.fromkeys(("biogpt", "gpt-sw3", "gpt2", "gpt_bigcode", "opt"), _WITH_POSITIONS),
    **dict.fromkeys(("afmoe", "beam", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _GATED),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), _Code(matrices=0)),
    **dict.fromkeys(("hunyuan_v1_moe", "llama4_text"), _Code(num_shared=1)),
    **dict.fromkeys(("zamba", "zamba2"), _Code(from_both=True)),
    "hrm_text": _Code(gates_attention=True, in_stacks=True),
    "modernbert-decoder": _Code(head_matrices=1),
    "jetmoe": _Code(chooses_heads=True),
    "moshi": _Code(halves=True),
}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model.

    Attributes:
        num_layers: Layers that have experts in place of an MLP.
        num_each: Experts that a token can choose in each of them.
        num_taken: Experts that a token takes.
        width: Hidden width of each.
        shared_width: Hidden width of what every token takes beside them; 0 for nothing.
        matrices: Matrices of each: 3 with a gate.
    """

    num_layers: int
    num_each: int
    num_taken: int
    width: int
    shared_width: int
    matrices: int


def experts_of(
    model_type: str, values: Mapping[str, Any], given: Mapping[str, Any], types: Sequence[str]
) -> Experts | None:
    """Return the experts that the entries of a config describe; None for a model without.

    Args:
        values: Its entries, with what its family fills in.
        given: Those that it states: files may call experts otherwise than their family's class.
        types: The types of its layers.
    """
    num_each = _first(given, _HOW_MANY) or _first(values, _HOW_MANY)
    if num_each < 2 or values.get("enable_moe_block") is False or values.get("is_moe") is False:
        return None
    width, code = _first(values, _HOW_WIDE), _CODE.get(model_type, _USUAL)
    shared = _first(values, _SHARED_WIDTH)
    shared = shared or (_first(values, _SHARED) or code.num_shared) * width
    return Experts(
        num_layers=_layers_with_experts(values, types),
        num_each=num_each,
        num_taken=min(_first(given, _TAKEN) or _first(values, _TAKEN) or 1, num_each),
        width=width,
        shared_width=shared,
        matrices=code.matrices,
    )


def mlp_width(model_type: str, values: Mapping[str, Any], experts: Experts | None) -> int:
    """Return the hidden width of an MLP."""
    width = count(values, "hidden_size")
    found = _first(values, _BESIDE) if experts else 0
    found = found or _first(values, _MLP_WIDTH)
    found = found or (count(values, "intermediate_multiple_size") or 4) * width
    if values.get("block_auto_adjust_ff_dim") is True:  # LFM2 rounds two thirds of it
        share, of = values.get("block_ffn_dim_multiplier"), count(values, "block_multiple_of")
        found = int((share if isinstance(share, int | float) else 1) * int(2 * found / 3))
        found = -(-found // of) * of if of else found
    return found // 2 if _CODE.get(model_type, _USUAL).halves else found


def count_parameters(
    model_type: str,
    values: Mapping[str, Any],
    *,
    types: Sequence[str],
    layers: Sequence[LayerShape],
    num_heads: int,
    head_dim: int,
    num_tables: int,
    experts: Experts | None,
) -> int:
    """Return the parameters of a decoder, all experts included.

    Exact for Llama, Mistral and Phi-3. Families with biases, more norms or gates of low rank have a
    few more, by less than one in a hundred at their released sizes.

    Args:
        values: The entries of its config, with what its family fills in.
        types: The type of each layer.
        layers: What each layer keeps.
        num_heads: Query heads.
        head_dim: Their width where a layer keeps no keys.
        num_tables: Tables of the vocabulary: 1 where head and embedding are tied, else 2.
    """
    code, width = _CODE.get(model_type, _USUAL), count(values, "hidden_size")
    attention = [
        _attention(code, values, layer.rows, LAYER_KINDS[name], num_heads, head_dim)
        for layer, name in zip(layers, types, strict=True)
    ]
    plain = types.count("mlp") + (len(types) if {"mlp", "moe"}.isdisjoint(types) else 0)
    if experts is not None and "moe" not in types:
        plain = max(plain - experts.num_layers, 0)
    attending = sum(size > 0 for size in attention)
    mlp = code.matrices * width * mlp_width(model_type, values, experts)
    states = sum(_states(values, layer.states, width) for layer in layers)
    if code.from_both:
        body = _from_both(values, types, max(attention), mlp, width)
    else:
        body = sum(attention) + plain * mlp
    norms = width * (2 * max(attending, plain) if code.matrices else len(layers))
    if experts is not None:
        router = width * experts.num_each
        shared = experts.matrices * width * experts.shared_width
        body += experts.num_layers * (router + shared) + count_expert_parameters(experts, width)
        if code.chooses_heads:
            heads = sum(lay.rows.heads * lay.rows.key_width for lay in layers if lay.rows)
            body += 2 * width * (experts.num_each - experts.num_taken) * heads
    if code.in_stacks and count(values, "num_layers_per_stack"):
        body = 2 * body * count(values, "num_layers_per_stack") // len(layers)
    positions = count(values, "max_position_embeddings") if code.has_positions else 0
    tables = (num_tables * count(values, "vocab_size") + positions) * width
    return body + states + norms + width + code.head_matrices * width**2 + tables


def count_expert_parameters(experts: Experts, width: int) -> int:
    """Return the parameters of the experts that tokens choose among, of a model of a width."""
    return experts.num_layers * experts.num_each * experts.matrices * width * experts.width


def _attention(
    code: _Code,
    values: Mapping[str, Any],
    rows: RowsShape | None,
    kind: AttentionKind,
    num_heads: int,
    head_dim: int,
) -> int:
    """Return the parameters of a layer's attention, 0 for one without."""
    if kind not in ("full", "sliding"):
        return 0
    width, rank = count(values, "hidden_size"), count(values, "kv_lora_rank")
    if rows is None:  # it looks at the rows of another layer
        return 2 * width * num_heads * head_dim
    if rank:  # keys and values, and mostly queries, go through something narrow
        rotated, plain = count(values, "qk_rope_head_dim"), count(values, "qk_nope_head_dim")
        value_width, narrow = count(values, "v_head_dim"), count(values, "q_lora_rank")
        queries = num_heads * (rotated + plain)
        queries = narrow * (width + queries) if narrow else width * queries
        keys = width * (rank + rotated) + rank * num_heads * (plain + value_width)
        return queries + keys + num_heads * value_width * width
    kv_heads = rows.heads
    if values.get("new_decoder_architecture") is True:  # keys of some heads, stored for every one
        kv_heads = count(values, "num_kv_heads") or kv_heads
    queries = num_heads * rows.key_width * (2 if code.gates_attention else 1)
    kept = kv_heads * rows.key_width
    if kind == "sliding" or values.get("attention_k_eq_v") is not True:
        kept += kv_heads * rows.value_width
    inside = 2 * width if code.from_both else width
    return inside * (queries + kept) + width * num_heads * rows.value_width


def _from_both(
    values: Mapping[str, Any], types: Sequence[str], attention: int, mlp: int, width: int
) -> int:
    """Return the parameters of Zamba's layers with attention, of which many are the same ones."""
    num = types.count("hybrid")
    each = width * width + count(values, "adapter_rank") * (width + 2 * mlp // (3 * width))
    return min(count(values, "num_mem_blocks") or 1, num) * (attention + mlp) + num * each


def _states(values: Mapping[str, Any], states: Sequence[StateShape], width: int) -> int:
    """Return the parameters of a layer with such states: what goes into them and comes out.

    A convolution's channels, a gate and the output of its heads, two numbers for each head. Of what
    some families have more, those of low rank that are known.
    """
    found = {state.name: state.shape for state in states}
    if not found:
        return 0
    channels, kept = found["conv"]
    convolution = channels * (kept + 1)
    if "recurrent" not in found:  # two gates and the output
        return width * (channels + 2 * (channels * 3 // 2)) + convolution
    heads, *_, last = found["recurrent"]
    if math.prod(found["recurrent"]) // last == channels:
        # every channel is a head: what it is given, and how fast it forgets, is of low rank
        rank = first_count(values, "time_step_rank", "mamba_dt_rank") or -(-width // 16)
        return 3 * width * channels + convolution + channels * (2 * rank + 3 * last + 2)
    inner = heads * last
    if "linear_attn_config" in values or "linear_num_heads" in values:
        # Kimi's gates: a number for every channel, of low rank but where the config says how
        # long its convolutions are
        full = "short_conv_kernel_size" in values
        gate = width * inner if full else last * (width + inner)
        return width * (channels + inner + heads) + 2 * gate + convolution
    return width * (channels + 2 * inner + 2 * heads) + convolution


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first entry that is a count, or begins with one; 0 where there is none."""
    for name in names:
        found = values.get(name)
        number = as_count(found[0] if isinstance(found, list) and found else found)
        if number:
            return number
    return 0


def _layers_with_experts(values: Mapping[str, Any], types: Sequence[str]) -> int:
    num_layers = len(types)
    if "moe" in types:
        return types.count("moe")
    kinds = values.get("mlp_layer_types")
    if isinstance(kinds, list) and kinds:
        return min(num_layers, len([kind for kind in kinds if kind != "dense"]))
    listed = values.get("moe_layer_freq")
    if isinstance(listed, list):
        return min(num_layers, sum(has is True or as_count(has) > 0 for has in listed))
    plain = values.get("mlp_only_layers")
    left_out = set(plain) if isinstance(plain, list) else set()
    period, offset = values.get("expert_layer_period"), values.get("expert_layer_offset")
    if isinstance(period, int) and period > 0 and isinstance(offset, int):
        return len(range(offset, num_layers, period))
    every = _first(values, _EVERY) or 1
    first = _first(values, _DENSE_AT_FIRST)
    layers = (n for n in range(first, num_layers) if n not in left_out and (n + 1) % every == 0)
    return len(list(layers))
