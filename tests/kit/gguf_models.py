"""GGUF files of tiny models, written as llama.cpp's converter writes them.

Names of tensors come from the package `gguf`, llama.cpp's own, so that what recmas reads is held
against another table than its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_CONTROL, _NORMAL = 3, 1


def write_gguf(
    folder: Path,
    path: Path,
    *,
    quantized: GGMLQuantizationType | None = None,
    without: tuple[str, ...] = (),
    more: Mapping[str, Any] | None = None,
    **values: Any,
) -> Path:
    """Write a Hugging Face folder of `kit.models` or `kit.zoo` as a GGUF file; returns its path.

    Args:
        quantized: Type of matrices; float32 without.
        without: Keys and names of tensors to leave out.
        more: Tensors by name that the model does not have, or instead of its own.
        values: More values, by key with `__` for a dot; None takes one away.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    found = _dimensions(config, architecture) | _vocabulary(folder)
    found |= {key.replace("__", "."): value for key, value in values.items()}
    writer = GGUFWriter(path, architecture)
    for key, value in found.items():
        if value is not None and key not in without:
            _add(writer, key, value)
    for name, weight in {**_tensors(model, architecture), **(more or {})}.items():
        if name in without:
            continue
        if quantized is not None and weight.ndim > 1 and weight.shape[-1] % 32 == 0:
            stored = gguf.quants.quantize(weight, quantized)
            writer.add_tensor(name, stored, raw_dtype=quantized)
        else:
            writer.add_tensor(name, weight)
    _finish(writer)
    return path


def write_values(path: Path, architecture: str | None, **values: Any) -> Path:
    """Write a GGUF file of values and one tensor, as parts, adapters and projectors are."""
    writer = GGUFWriter(path, architecture or "")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture", None)
    for key, value in values.items():
        _add(writer, key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    _finish(writer)
    return path


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _dimensions(config: Any, architecture: str) -> dict[str, Any]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head,
        "attention.value_length": head,
    }
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    found["rope.freq_base"] = float(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        found["rope.scaling.type"] = rope["rope_type"]
        found["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
    if architecture.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if architecture == "qwen3moe":
        found["expert_count"] = config.num_experts
        found["expert_used_count"] = config.num_experts_per_tok
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _vocabulary(folder: Path) -> dict[str, Any]:
    """Return the values of a byte-level BPE tokenizer.json, with its chat template."""
    told = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"] for token in told["added_tokens"]}
    vocabulary = dict(told["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in told["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_CONTROL if t in added else _NORMAL for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in told["model"]["merges"]],
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = settings.get(f"{role}_token")
        if token is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = vocabulary[token]
    return found


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    config = model.config
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.detach().float().numpy()
        stem, _, end = name.rpartition(".")
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "llama":
            for part, count in heads.items():
                if f".{part}_proj." in name:
                    halves = array.reshape(count, 2, -1, *array.shape[1:])
                    array = halves.swapaxes(1, 2).reshape(array.shape)
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}"
            gate, up = np.split(array, 2, axis=1)
            found[f"{block}.ffn_gate_exps.weight"] = np.ascontiguousarray(gate)
            found[f"{block}.ffn_up_exps.weight"] = np.ascontiguousarray(up)
            continue
        if name.endswith("experts.down_proj"):
            stem, end = name, "weight"
        told = names.get_name(stem)
        assert told is not None, name
        found[f"{told}.{end}"] = np.ascontiguousarray(array)
    return found


def llama3_divisors(config: Mapping[str, Any], theta: float, head_dim: int) -> Any:
    """Return what llama.cpp's converter writes as `rope_freqs.weight` for Llama 3."""
    factors = []
    low_wavelength = config["original_max_position_embeddings"] / config["low_freq_factor"]
    high_wavelength = config["original_max_position_embeddings"] / config["high_freq_factor"]
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(config["factor"])
        else:
            smooth = (
                config["original_max_position_embeddings"] / wavelength - config["low_freq_factor"]
            ) / (config["high_freq_factor"] - config["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / config["factor"] + smooth))
    return np.array(factors, dtype=np.float32)
