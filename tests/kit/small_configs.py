"""Small configs of any causal model type: the defaults of its class, with few and narrow layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("ffn_dim", "dff", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "linear_hidden_size"), 32),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "mamba_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_n_heads", "mamba_num_heads", "index_topk"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("eos_token_id", "sep_token_id", "decoder_start_token_id"), 2),
    "pad_token_id": 0,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}

_IMAGES: Final = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "image_size": 28,
    "num_attention_heads": 2,
    "patch_size": 14,
}

# What single types need besides, and those whose parts have configs of their own.
_OTHERS: Final[Mapping[str, dict[str, Any]]] = {
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "git": {"vision_config": _IMAGES},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"max_seq_len": 256},
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str) -> Any:
    """Return a config of a model type whose model is built in a moment.

    Raises:
        Exception: What its class raises for the sizes that all others take.
    """
    kind = CONFIG_MAPPING[model_type]
    named = {other: name for name, other in kind.attribute_map.items()}
    declared = [field.name for field in fields(kind)]
    sizes = {name: _SIZES[named.get(name, name)] for name in declared if _size_of(name, named)}
    return kind(**{**sizes, **_OTHERS.get(model_type, {})})


def _size_of(name: str, named: Mapping[str, str]) -> bool:
    return named.get(name, name) in _SIZES
