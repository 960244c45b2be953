"""Tiny random models of many model types, as Hugging Face folders: what each exercises, in a table.

The tokenizer is that of a family in `kit.models`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from kit.models import COMMON_DIMS, FAMILIES, make_tokenizer
from kit.random_weights import random_model

_KIND: Final = "qwen2"  # whose tokenizer and template all have
_WINDOW: Final = {"sliding_window": 12}
_MIXED: Final = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS: Final = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS: Final = {"num_local_experts": 8, "num_experts_per_tok": 2}
_ROUTED_EXPERTS: Final = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_NOT_GIVEN: Final = object()  # an entry that the type does not have

_ROPE: Final = {"rope_type": "default", "rope_theta": 1e4}
_YARN: Final = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_OLD_NAMES: Final = {
    "num_key_value_heads": _NOT_GIVEN,
    "intermediate_size": _NOT_GIVEN,
    "n_inner": 96,
}

_DELTA_NET: Final = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}

_CONVOLUTION: Final = {"layer_types": ["conv", "full_attention"]}
_MAMBA_2: Final = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
}
_NO_ATTENTION: Final = dict.fromkeys(
    (
        *("intermediate_size", "num_attention_heads", "num_key_value_heads"),
        "max_position_embeddings",
    ),
    _NOT_GIVEN,
)
_LATENT: Final = {
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}

_VISION: Final = {"hidden_size": 32, "intermediate_size": 32, "patch_size": 14, "image_size": 28}
_LAYERS: Final = {"num_hidden_layers": 1, "num_attention_heads": 2}

# name -> entries of its config besides the common ones; the model type is the name's beginning
ZOO: Final[Mapping[str, dict[str, Any]]] = {
    "gpt_neox": {"num_key_value_heads": _NOT_GIVEN, "rotary_pct": 0.5},
    "granitemoehybrid attention": {
        "layer_types": ["attention", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
    },
    "granite": {
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_MIXED, "logit_scale": 0.5},
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "mixtral": {**_LOCAL_EXPERTS, **_WINDOW},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": _ROUTED_EXPERTS,
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},
    "minimax_m2": _LOCAL_EXPERTS,
    "granitemoe": {**_LOCAL_EXPERTS, "logits_scaling": 4.0},
    "gpt_oss": {**_LOCAL_EXPERTS, **_MIXED},
    "flint": {
        **_EXPERTS,
        **_MIXED,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
        "head_dim": 16,
    },
    "granite_swa": {**_MIXED, "logits_scaling": 4.0},
    "granitemoe_swa": {**_MIXED, **_LOCAL_EXPERTS, "logits_scaling": 4.0},
    "granitemoeshared": {**_LOCAL_EXPERTS, "shared_intermediate_size": 48},
    "cohere2_moe": {**_MIXED, "num_experts": 8, "num_experts_per_tok": 2, "logit_scale": 0.5},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2},
    "phimoe": {**_LOCAL_EXPERTS, **_WINDOW},
    "exaone_moe": {**_EXPERTS, **_MIXED, "first_k_dense_replace": 1, "n_group": 1},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "hy_v3": {**_EXPERTS, "head_dim": 16},
    "dots1": {**_ROUTED_EXPERTS, **_WINDOW, "n_shared_experts": 1},
    "beam": {
        **_EXPERTS,
        **_MIXED,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
        "head_dim": 16,
    },
    "laguna": {**_EXPERTS, **_MIXED, "head_dim": 16, "shared_expert_intermediate_size": 48},
    "kolibri1": {**_EXPERTS, **_MIXED, "head_dim": 16, "shared_expert_intermediate_size": 48},
    "mellum": {**_EXPERTS, **_MIXED, "head_dim": 16},
    "solar_open": {
        **_ROUTED_EXPERTS,
        "first_k_dense_replace": _NOT_GIVEN,  # all of its layers have experts
        "n_shared_experts": 1,
        "head_dim": 16,
    },
    "afmoe": {**_EXPERTS, **_MIXED, "num_dense_layers": 1, "num_shared_experts": 1},
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 16, "num_attention_heads": _NOT_GIVEN},
    "gpt2": {**_OLD_NAMES},
    "gpt_bigcode": {**_OLD_NAMES},
    "ctrl": {"num_key_value_heads": _NOT_GIVEN, "intermediate_size": _NOT_GIVEN, "dff": 96},
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1e3},
    },
    "helium": {"head_dim": 16, "num_key_value_heads": 4},
    "hyperclovax": {
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
    },
    "llama": {},
    "llama yarn": {"rope_parameters": {**_YARN}},
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 24},
    "gemma2": {**_MIXED, "head_dim": 24, "query_pre_attn_scalar": 40},
    "gemma3_text": {**_MIXED, "head_dim": 24, "query_pre_attn_scalar": 40},
    "vaultgemma": {**_MIXED, "head_dim": 24, "query_pre_attn_scalar": 40},
    "mistral": {**_WINDOW, "head_dim": 24},
    "ministral": {**_MIXED, "head_dim": 24},
    "ministral3": {"head_dim": 24},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {**_WINDOW},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": _MIXED,
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "exaone4": _MIXED,
    "glm": {"head_dim": 24},
    "glm4": {"head_dim": 24},
    "nemotron": {},
    "persimmon": {"num_key_value_heads": _NOT_GIVEN},
    "seed_oss": {"head_dim": 24},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cwm": {**_MIXED, "head_dim": 24, "bos_token_id": 0},
    "diffllama": {},
    "ernie4_5": {"head_dim": 24},
    "jais2": {},
    "iquestcoder": {},
    "nanochat": {},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_next": {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "olmo_hybrid": {name: value for name, value in _DELTA_NET.items() if name != "head_dim"},
    "lfm2": {**_CONVOLUTION, "full_attn_idxs": [1]},
    "lfm2_moe": {**_CONVOLUTION, **_EXPERTS, "num_dense_layers": 1},
    "lfm3": {**_CONVOLUTION, **_WINDOW, "head_dim": 16},
    "granitemoehybrid": {
        **_MAMBA_2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "logits_scaling": 4.0,
    },
    "granitemoehybrid experts": {
        **_MAMBA_2,
        **_LOCAL_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_intermediate_size": 48,
    },
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 128},
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 24,
        "n_groups": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "time_step_limit": [0.4, 1.0],
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_d_state": 24,
        "mamba_ngroups": 2,
        "adapter_rank": 8,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
    },
    "mamba2": {
        **_NO_ATTENTION,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 24,
        "n_groups": 2,
    },
    "mamba": {**_NO_ATTENTION, "state_size": 8},
    "falcon_mamba": {**_NO_ATTENTION, "state_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "kimi_linear": {
        **_LATENT,
        **_LOCAL_EXPERTS,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "bailing_hybrid": {
        **_LATENT,
        "num_key_value_heads": 4,
        "layer_group_size": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "deepseek_v2": {**_LATENT, **_ROUTED_EXPERTS, "n_shared_experts": 1},
    "deepseek_v3": {**_LATENT, **_ROUTED_EXPERTS, "n_shared_experts": 1},
    "glm4_moe_lite": {**_LATENT, **_ROUTED_EXPERTS, "n_shared_experts": 1},
    "minicpm3": {**_LATENT},
    "youtu": {**_LATENT},
    "axk1": {**_LATENT, **_ROUTED_EXPERTS, "n_shared_experts": 1},
    "gemma4_text": {
        **_MIXED,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    },
    "gemma4_text keys as values": {
        **_MIXED,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "gemma4_unified_text": {**_MIXED, "head_dim": 16, "global_head_dim": 32},
    "mimo_v2_flash": {
        **_MIXED,
        **_ROUTED_EXPERTS,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
    },
    "internlm3": {"head_dim": 24},
    "llama dynamic": {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 2.0}},
    "phi3 longrope": {
        **_WINDOW,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            **_ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [4.0] * 8,
        },
    },
    "cohere_compass_text": {
        **_MIXED,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "opt": {"num_key_value_heads": _NOT_GIVEN, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "biogpt": {"num_key_value_heads": _NOT_GIVEN},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "modernbert-decoder": {
        **_MIXED,
        "num_key_value_heads": _NOT_GIVEN,
        **{f"{name}_token_id": 0 for name in ("bos", "cls", "sep")},
    },
    "hrm_text": {"num_key_value_heads": 4},
    "doge": {"keep_window_size": 1024},
    "llama4_text": {
        **_LOCAL_EXPERTS,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "attention_chunk_size": 12,
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
        "interleave_moe_layer_step": 1,
    },
    "gptj": {**_OLD_NAMES, "rotary_dim": 8},
    "codegen": {**_OLD_NAMES, "rotary_dim": 8},
    "gpt_neox_japanese": {
        "num_key_value_heads": _NOT_GIVEN,
        "intermediate_size": _NOT_GIVEN,
        "intermediate_multiple_size": 2,
    },
    "bloom": {"num_key_value_heads": _NOT_GIVEN, "intermediate_size": _NOT_GIVEN},
    "falcon": {"num_key_value_heads": _NOT_GIVEN, "intermediate_size": _NOT_GIVEN},
    "falcon new": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_key_value_heads": _NOT_GIVEN,
        "intermediate_size": _NOT_GIVEN,
    },
    "xglm": {
        "num_key_value_heads": _NOT_GIVEN,
        "intermediate_size": _NOT_GIVEN,
        "ffn_dim": 96,
    },
    "gpt-sw3": {**_OLD_NAMES},
    "moshi": {**_WINDOW, "intermediate_size": _NOT_GIVEN, "ffn_dim": 192},
    "minimax_m3_vl_text full attention": {
        **_LOCAL_EXPERTS,
        "head_dim": 16,
        "rotary_dim": 8,
        "dense_intermediate_size": 112,
        "shared_intermediate_size": 48,
        "mlp_layer_types": ["dense", "sparse"],
        "swiglu_limit": 0.7,
    },
    "phi4_multimodal": {
        **_WINDOW,
        "vision_config": {**_VISION, **_LAYERS, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
}


@dataclass(frozen=True)
class Seeing:
    """A model that also sees or hears: entries of its text config besides the common ones.

    Attributes:
        vision: The config of what sees; None where nothing does.
        audio: That of what hears.
        others: Entries beside the parts.
    """

    text: dict[str, Any]
    vision: dict[str, Any] | None
    audio: dict[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def entries(self, text: dict[str, Any]) -> dict[str, Any]:
        """Return the entries of the whole config around those of its text config."""
        parts = {"text_config": text, "vision_config": self.vision, "audio_config": self.audio}
        return {**self.others, **{name: part for name, part in parts.items() if part is not None}}


_BLOCKS: Final = {"depth": 1, "num_heads": 2, "out_hidden_size": 64}
_SECTIONS: Final = {
    "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]},
    "head_dim": 16,
}

SEEING: Final[Mapping[str, Seeing]] = {
    "gemma3": Seeing({**_MIXED, "head_dim": 24}, {**_VISION, **_LAYERS}),
    "mistral3": Seeing(
        {"model_type": "mistral", "head_dim": 24},
        {"model_type": "pixtral", **_VISION, **_LAYERS},
    ),
    "mistral3 ministral3": Seeing(
        {"model_type": "ministral3", "head_dim": 24},
        {"model_type": "pixtral", **_VISION, **_LAYERS},
    ),
    "llama4": Seeing(
        ZOO["llama4_text"],
        {
            **_VISION,
            **_LAYERS,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    ),
    "qwen2_vl": Seeing(_SECTIONS, {**_BLOCKS, "embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": Seeing(_SECTIONS, {**_VISION, **_BLOCKS}),
    "qwen3_vl": Seeing(_SECTIONS, {**_VISION, **_BLOCKS, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": Seeing(
        {**_SECTIONS, **_EXPERTS}, {**_VISION, **_BLOCKS, "deepstack_visual_indexes": [0]}
    ),
    "qwen3_5": Seeing(_DELTA_NET, {**_VISION, **_BLOCKS}),
    "qwen3_5_moe": Seeing(ZOO["qwen3_5_moe_text"], {**_VISION, **_BLOCKS}),
    "glm4v": Seeing(_SECTIONS, {**_VISION, **_BLOCKS}),
    "glm4v_moe": Seeing(
        {
            **_ROUTED_EXPERTS,
            "head_dim": 16,
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
        },
        {**_VISION, **_BLOCKS},
    ),
    "fuyu": Seeing(
        {"model_type": "persimmon", "num_key_value_heads": _NOT_GIVEN},
        None,
        others={"patch_size": 4},
    ),
    "gemma4_unified": Seeing(
        ZOO["gemma4_unified_text"],
        {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
        {"audio_embed_dim": 32},
    ),
    "got_ocr2": Seeing(
        {"model_type": "qwen2"},
        {
            **_LAYERS,
            "hidden_size": 32,
            "mlp_dim": 64,
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 16,
            "global_attn_indexes": [0],
            "window_size": 2,
        },
    ),
    "moss_transcribe_diarize": Seeing(
        {"model_type": "qwen3", "head_dim": 16},
        None,
        {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 8,
        },
    ),
}

_WITH_SINKS: Final = ("gpt_oss", "flint", "granite_swa", "granitemoe_swa")

# One of each mechanism: a tenth of the time that all take.
FAST: Final = (
    *("gpt_neox", "granite", "helium", "qwen3_moe", "gpt_oss", "afmoe", "jetmoe", "gpt2"),
    *("hunyuan_v1_dense", "gptj", "aria_text", "llama4_text", "modernbert-decoder", "qwen3_vl"),
    "qwen3_5_text",
)


def exercised(name: str) -> tuple[str, ...]:
    """Return in words what a row of the zoo has that not every model has."""
    row = SEEING[name].text if name in SEEING else ZOO[name]
    words = {
        "sliding window": "sliding_window" in row,
        "experts": any("expert" in key for key in row if row[key] != 0),
        "attention sinks": name in _WITH_SINKS,
        "scaled logits": any(key.startswith("logit") for key in row),
        "multipliers": "attention_multiplier" in row,
        "rotary scaling": "factor" in row.get("rope_parameters", {}),
        "chunks": "attention_chunk_size" in row,
        "head width of its own": "head_dim" in row,
    }
    return tuple(word for word, has in words.items() if has)


def zoo_config(name: str, *, rounds: int = 1) -> tuple[Any, Any]:
    """Return what loads the model of a row, and its config; `rounds` of its two layers."""
    kind, tokenizer = FAMILIES[_KIND], make_tokenizer(_KIND)
    common = {
        **COMMON_DIMS,
        "num_hidden_layers": 2 * rounds,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    row = _repeated(SEEING[name].text if name in SEEING else ZOO[name], rounds)
    entries = {key: v for key, v in {**common, **row}.items() if v is not _NOT_GIVEN}
    end, pad = tokenizer.token_to_id(kind.eos), tokenizer.token_to_id(kind.pad)
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    model_type, loader = name.partition(" ")[0], AutoModelForCausalLM
    if name in SEEING:
        entries = SEEING[name].entries({**entries, **tokens})
        if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            loader = AutoModelForImageTextToText
    return loader, AutoConfig.for_model(model_type, **{**tokens, **entries})


def _repeated(row: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Return the entries of a row with what they list by layer `rounds` times."""
    return {
        key: value * rounds if isinstance(value, list) and len(value) == 2 else value
        for key, value in row.items()
    }


def write_zoo_config(folder: Path, name: str, config: Any, model: Any) -> None:
    """Write the config of a row's model, with the name that its files have."""
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    path, model_type = folder / "config.json", name.partition(" ")[0]
    # where an old name of another type's has its own files
    written = json.loads(path.read_bytes()) | {"model_type": model_type}
    path.write_text(json.dumps(written), encoding="utf-8")


def write_zoo_model(folder: Path, name: str, *, seed: int = 0, rounds: int = 1) -> Path:
    """Write the tiny model of a row of `ZOO` with its tokenizer; returns its folder."""
    kind, tokenizer = FAMILIES[_KIND], make_tokenizer(_KIND)
    loader, config = zoo_config(name, rounds=rounds)
    model = random_model(loader, config, seed=seed)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_zoo_config(folder, name, config, model)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(kind.template, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": kind.eos,
        "pad_token": kind.pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
