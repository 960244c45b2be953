"""Architectures of llama.cpp's whose files are read, and how transformers writes each of them.

A file gives the dimensions of its model; the rest is in llama.cpp's code. The table here says what
that code does: a test holds it against models of transformers, tensor by tensor and in numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """Where a tensor belongs, and its shape in dimensions of the model.

    Attributes:
        target: Name of the parameter; `{}` stands for the layer.
        shape: Letters: D width, Q and K width of all query and key/value heads, H of one head, F of
            the MLP, V the vocabulary, E experts, M width of one expert's MLP.
        is_interleaved: Rows of a head lie as llama.cpp's rotary embedding takes them: a pair of
            neighbours turns together, where transformers turns halves.
        is_offset: It is stored plus one.
        part: Which of two tensors it is that are one parameter in transformers, one behind the
            other in dimension 1.
    """

    target: str
    shape: str
    is_interleaved: bool = False
    is_offset: bool = False
    part: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How an architecture of llama.cpp's is written for transformers.

    Attributes:
        causal_class: Name of the class in transformers.
        layer: Tensors of a layer, by name behind `blk.N.`.
        keys: Values that its files have besides the common ones, by what the config calls them.
        constants: What llama.cpp's code takes for granted.
        usual: Values that some files state though the code takes them for granted.
        more: The entries of the config that follow from others.
        is_offset: Norms are stored plus one.
    """

    model_type: str
    causal_class: str
    layer: Mapping[str, TensorRule]
    keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    is_offset: bool = False

    def tensors(self, num_layers: int) -> Iterator[tuple[str, TensorRule]]:
        """Give every tensor of a model, that of an untied head included."""
        yield "token_embd.weight", TensorRule(target="model.embed_tokens.weight", shape="VD")
        yield "output.weight", TensorRule(target="lm_head.weight", shape="VD")
        norm = TensorRule(target="model.norm.weight", shape="D", is_offset=self.is_offset)
        yield "output_norm.weight", norm
        for number in range(num_layers):
            for name, rule in self.layer.items():
                yield f"blk.{number}.{name}", rule


def _attention(*, interleaved: bool = False, biased: bool = False) -> dict[str, TensorRule]:
    rules = {}
    for name, rows in (("q", "Q"), ("k", "K"), ("v", "K")):
        turned = interleaved and name != "v"
        target = f"model.layers.{{}}.self_attn.{name}_proj"
        rules[f"attn_{name}.weight"] = TensorRule(
            target=f"{target}.weight", shape=f"{rows}D", is_interleaved=turned
        )
        if biased:
            rules[f"attn_{name}.bias"] = TensorRule(target=f"{target}.bias", shape=rows)
    output = TensorRule(target="model.layers.{}.self_attn.o_proj.weight", shape="DQ")
    return rules | {"attn_output.weight": output}


def _head_norms(*, offset: bool = False) -> dict[str, TensorRule]:
    return {
        f"attn_{name}_norm.weight": TensorRule(
            target=f"model.layers.{{}}.self_attn.{name}_norm.weight", shape="H", is_offset=offset
        )
        for name in "qk"
    }


def _norms(offset: bool = False, **targets: str) -> dict[str, TensorRule]:
    return {
        f"{name}.weight": TensorRule(
            target=f"model.layers.{{}}.{target}.weight", shape="D", is_offset=offset
        )
        for name, target in targets.items()
    }


_MLP: Final = {
    f"ffn_{name}.weight": TensorRule(
        target=f"model.layers.{{}}.mlp.{name}_proj.weight", shape="DF" if name == "down" else "FD"
    )
    for name in ("gate", "up", "down")
}
_TWO_NORMS: Final = _norms(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
_FOUR_NORMS: Final = _norms(
    offset=True,
    attn_norm="input_layernorm",
    post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    post_ffw_norm="post_feedforward_layernorm",
)
_EXPERTS: Final = {
    "ffn_gate_inp.weight": TensorRule(target="model.layers.{}.mlp.gate.weight", shape="ED"),
    "ffn_gate_exps.weight": TensorRule(
        target="model.layers.{}.mlp.experts.gate_up_proj", shape="EMD", part=0
    ),
    "ffn_up_exps.weight": TensorRule(
        target="model.layers.{}.mlp.experts.gate_up_proj", shape="EMD", part=1
    ),
    "ffn_down_exps.weight": TensorRule(target="model.layers.{}.mlp.experts.down_proj", shape="EDM"),
}

# Layers of Gemma's largest models, whose attention is scaled by all heads' width, not by one's.
_SCALED_BY_WIDTH: Final = {"gemma2": 46, "gemma3_text": 62}
_GEMMA2_PERIOD: Final = 2
_GEMMA3_PERIOD: Final = 6
_GEMMA3_LOCAL_THETA: Final = 10_000.0


def _gemma(config: dict[str, Any]) -> dict[str, Any]:
    scale = config["head_dim"]
    if config["num_hidden_layers"] == _SCALED_BY_WIDTH[config["model_type"]]:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scale}


def _gemma2(config: dict[str, Any]) -> dict[str, Any]:
    return _gemma(config) | _layer_types(config, _GEMMA2_PERIOD)


def _gemma3(config: dict[str, Any]) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": _GEMMA3_LOCAL_THETA}
    rope = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return _gemma(config) | _layer_types(config, _GEMMA3_PERIOD) | {"rope_parameters": rope}


def _layer_types(config: dict[str, Any], period: int) -> dict[str, Any]:
    cycle = ["sliding_attention"] * (period - 1) + ["full_attention"]
    return {"layer_types": [cycle[i % period] for i in range(config["num_hidden_layers"])]}


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture(
        model_type="llama",
        causal_class="LlamaForCausalLM",
        layer=_attention(interleaved=True) | _TWO_NORMS | _MLP,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        causal_class="Qwen2ForCausalLM",
        layer=_attention(biased=True) | _TWO_NORMS | _MLP,
        constants={"use_sliding_window": False},
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        causal_class="Qwen3ForCausalLM",
        layer=_attention() | _head_norms() | _TWO_NORMS | _MLP,
        constants={"use_sliding_window": False},
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        causal_class="Qwen3MoeForCausalLM",
        layer=_attention() | _head_norms() | _TWO_NORMS | _EXPERTS,
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        constants={"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        causal_class="Gemma2ForCausalLM",
        layer=_attention() | _FOUR_NORMS | _MLP,
        keys={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        usual={"attention.sliding_window_pattern": _GEMMA2_PERIOD},
        more=_gemma2,
        is_offset=True,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        causal_class="Gemma3ForCausalLM",
        layer=_attention() | _head_norms(offset=True) | _FOUR_NORMS | _MLP,
        keys={"attention.sliding_window": "sliding_window"},
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        usual={
            "attention.sliding_window_pattern": _GEMMA3_PERIOD,
            "rope.freq_base_swa": _GEMMA3_LOCAL_THETA,
        },
        more=_gemma3,
        is_offset=True,
    ),
}
