"""What configs of every causal language model may leave out, read from transformers' classes.

`python tests/with_torch/config_defaults.py` writes the table that the compiler reads; do so when
transformers is updated.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from dataclasses import fields
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recmas_compiler.backbones.config.defaults import DEFAULTS_FILE

FIELDS = (
    "attention_k_eq_v",
    "global_head_dim",
    "head_dim",
    "hidden_size",
    "hidden_size_per_layer_input",
    "intermediate_size",
    "keep_window_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "max_window_layers",
    "multi_query",
    "new_decoder_architecture",
    "num_attention_heads",
    "num_hidden_layers",
    "num_global_key_value_heads",
    "num_key_value_heads",
    "num_kv_shared_layers",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "sliding_window",
    "sliding_window_pattern",
    "swa_head_dim",
    "swa_num_key_value_heads",
    "swa_v_head_dim",
    "tie_word_embeddings",
    "use_sliding_window",
    "v_head_dim",
    "vocab_size",
)
# Entries of mixtures of experts: how many there are, how many a token takes, how wide they are, and
# which layers have none.
EXPERT_FIELDS = (
    "decoder_sparse_step",
    "expert_layer_offset",
    "expert_layer_period",
    "first_k_dense_replace",
    "moe_intermediate_size",
    "moe_k",
    "moe_layer_interval",
    "moe_layer_start_index",
    "moe_num_experts",
    "moe_num_shared_experts",
    "moe_topk",
    "n_routed_experts",
    "n_shared_experts",
    "num_dense_layers",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
# How wide MLPs are, and in which of a model's layers.
MLP_FIELDS = (
    "block_auto_adjust_ff_dim",
    "block_multiple_of",
    "dense_intermediate_size",
    "dff",
    "ffn_dim",
    "intermediate_multiple_size",
    "intermediate_size_mlp",
    "interleave_moe_layer_step",
    "is_moe",
)
# Names that files have besides those that classes map: their constructors take them.
FURTHER_NAMES = {
    "bloom": {"hidden_size": "n_embed", "max_position_embeddings": "seq_length"},
    "llama4_text": {"sliding_window": "attention_chunk_size"},
    "mpt": {"max_position_embeddings": "max_seq_len"},
}
# Models that see, whose text model has no causal class: it runs with the head of the whole.
SEEING = ("glm4v", "glm4v_moe", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
# Entries of layers that keep a state: how many heads and how wide, and what a convolution sees.
STATE_FIELDS = (
    "attn_layer_offset",
    "attn_layer_period",
    "conv_L_cache",
    "conv_kernel",
    "expand",
    "layer_group_size",
    "linear_allow_neg_eigval",
    "linear_conv_kernel_dim",
    "linear_head_dim",
    "linear_key_head_dim",
    "linear_num_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "mamba_d_conv",
    "mamba_d_ssm",
    "mamba_d_state",
    "mamba_expand",
    "mamba_head_dim",
    "mamba_n_groups",
    "mamba_n_heads",
    "mamba_ngroups",
    "mamba_num_heads",
    "n_groups",
    "n_mamba_heads",
    "num_heads",
    "short_conv_kernel_size",
    "ssm_state_size",
    "state_size",
)
# What the code of families that keep a state in some of their layers names.
STATE_NAMES = ("Rglru", "rwkv", "mLSTM", "LightningAttention")
# What makes masks with a window.
WINDOW_NAMES = ("create_sliding_window", "create_masks_for_generate")
# By which of them a config is told from one that calls something else so.
STATE_ENTRIES = {name for name in STATE_FIELDS if name not in ("n_groups", "num_heads", "expand")}
MANY_LAYERS = 61  # prime: no cycle ends with the last layer, which some families make another type
LONGEST_CYCLE = 12


def all_defaults() -> dict[str, dict[str, Any]]:
    """Return by model type what its config class fills in, sorted; values of None are left out."""
    models = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = {name: CONFIG_MAPPING[name] for name in (*models, *SEEING)}
    for outer in list(classes.values()):
        text = outer.sub_configs.get("text_config")
        if text not in (None, AutoConfig):  # that one stands for any type
            classes[text.model_type] = text
    seeing = {classes[name].sub_configs["text_config"].model_type for name in SEEING}
    return {
        name: _defaults(classes[name]) | ({} if name in seeing else _code(models.get(name)))
        for name in sorted(classes)
        if name not in SEEING or name in models
    }


def table_text() -> str:
    """Return the table as the compiler's file holds it, one line per model type."""
    lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in all_defaults().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _defaults(config_class: Any) -> dict[str, Any]:
    # The fields as declared. An instance holds what its constructor made of them: it drops, say,
    # the window of a Qwen2 that does not use it, and a config that uses it relies on that window.
    declared = {field.name: field.default for field in fields(config_class)}
    names = {n: config_class.attribute_map[n] for n in FIELDS if n in config_class.attribute_map}
    names |= FURTHER_NAMES.get(config_class.model_type, {})
    values = {name: declared.get(names.get(name), declared.get(name)) for name in FIELDS}
    # as they are named in a file: of two names for one value, only that of the file
    values |= {name: declared.get(name) for name in (*EXPERT_FIELDS, *MLP_FIELDS)}
    if STATE_ENTRIES & declared.keys():
        values |= {name: declared.get(name) for name in STATE_FIELDS}
    found = {name: value for name, value in values.items() if isinstance(value, int)}
    if names:
        found["names"] = names
    text = config_class.sub_configs.get("text_config")
    if text not in (None, AutoConfig):
        found["text_config"] = text.model_type
    if found.keys().isdisjoint(("max_window_layers", "use_sliding_window")):
        types = layer_types(config_class, MANY_LAYERS)
        if types is not None:
            cycle = cycle_of(types)
            if "sliding_attention" in cycle and "sliding_window" not in found:
                cycle = []  # the window has another name
            found["layer_cycle"] = cycle
    return dict(sorted(found.items()))


def _code(model_name: str | None) -> dict[str, Any]:
    """Return what the code of a causal model does that its config does not say."""
    if model_name is None:  # a text model that only exists inside another one
        return {"code": "no causal class"}
    model_class = getattr(transformers, model_name)
    found: dict[str, Any] = {}
    if not model_name.endswith("ForCausalLM"):
        found["causal_class"] = model_name
    source = inspect.getsource(sys.modules[model_class.__module__])
    declared = {field.name: field.default for field in fields(model_class.config_class)}
    # Those of encoders and of decoders that read what an encoder made of another text.
    is_of_encoders = "is_decoder" in declared or declared.get("is_encoder_decoder") is True
    if is_of_encoders and "encoder_hidden_states" in source:
        return found | {"code": "encoder"}
    # An entry that its code leaves alone: its masks have no window.
    if "sliding_window" in declared and not any(name in source for name in WINDOW_NAMES):
        found["layer_cycle"] = ["full_attention"]
    if any(name in source for name in STATE_NAMES):
        return found | {"code": "state"}
    taken = inspect.signature(model_class.forward).parameters.keys()
    if "past_key_values" not in taken and "shared_kv_states" in taken:
        return found | {"code": "draft"}
    if taken.isdisjoint(("past_key_values", "use_cache")):
        return found | {"code": "no cache"}
    return found


def cycle_of(types: list[str]) -> list[str]:
    """Return the types that repeat over the depth, or none if they do not."""
    if len(types) != MANY_LAYERS:  # they come from some other value
        return []
    for length in range(1, LONGEST_CYCLE + 1):
        if all(name == types[i % length] for i, name in enumerate(types)):
            return types[:length]
    return []


def layer_types(config_class: Any, num_layers: int) -> list[str] | None:
    """Return the types of layers of a config that says nothing but its depth, if it has any."""
    name = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    # a few classes take no other depth than their own
    with contextlib.suppress(StrictDataclassError, NotImplementedError):
        types = getattr(config_class(**{name: num_layers}), "layer_types", None)
        return list(types) if isinstance(types, list | tuple) else None
    return None


if __name__ == "__main__":
    DEFAULTS_FILE.write_text(table_text())
