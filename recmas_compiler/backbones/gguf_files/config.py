"""What a GGUF file says of its model, as the `config.json` that transformers would have.

Whatever a file says beyond what is read here is refused: a number that nobody reads would be a
model that computes something else. Tensors are held against the dimensions, too, so that what is
missing or does not fit is told without loading anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from recmas_compiler.backbones.gguf_files.architectures import ARCHITECTURES, Architecture
from recmas_compiler.backbones.gguf_files.header import GgufError, GgufHeader
from recmas_compiler.backbones.gguf_files.tokenizer import check_tokenizer, end_token_ids
from recmas_runtime.core.text import counted

_CONVERT_ANEW: Final = "Convert the model anew with a current llama.cpp."
_USE_SAFETENSORS: Final = "Use the model's safetensors repository."

_COMMON_KEYS: Final[Mapping[str, str]] = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Values read by the functions below, or that change nothing.
_OTHER_KEYS: Final = frozenset(
    {
        "vocab_size",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
# Values that change nothing as long as they say what is so anyway.
_USUAL_VALUES: Final[Mapping[str, Any]] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "tensor_data_layout": "Meta AI original pth",
}


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Return the `config.json` of a GGUF file's model, after holding its tensors against it.

    Raises:
        GgufError: An architecture, value or tensor that recmas does not know, or one that is
            missing or does not fit.
    """
    name = header.values["general.architecture"]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise GgufError(
            f"has a model of the architecture `{name}`, which recmas does not read from GGUF files",
            f"{_USE_SAFETENSORS} Known architectures: {', '.join(ARCHITECTURES)}.",
        )
    check_tokenizer(header.values)
    config = _Values(header, name).config(architecture)
    _check_tensors(header, architecture, config)
    return config


@dataclass(frozen=True)
class _Values:
    """Reads the values of one architecture."""

    header: GgufHeader
    prefix: str

    def config(self, architecture: Architecture) -> dict[str, Any]:
        self._refuse_unknown(architecture)
        named = {**_COMMON_KEYS, **architecture.keys}
        config: dict[str, Any] = {
            "model_type": architecture.model_type,
            "architectures": [architecture.causal_class],
            **architecture.constants,
            "tie_word_embeddings": "output.weight" not in self.header.tensors,
            "vocab_size": self._vocab_size(),
        }
        heads = self._get("attention.head_count")
        for key, entry in named.items():
            usual = heads if key == "attention.head_count_kv" else None
            found = self._get(key, usual)
            if found is None:
                raise GgufError(f"does not say `{self.prefix}.{key}`", _CONVERT_ANEW)
            if isinstance(found, list):
                if len(set(found)) != 1:
                    raise GgufError(
                        f"has layers of different dimensions (`{self.prefix}.{key}`)",
                        _USE_SAFETENSORS,
                    )
                found = found[0]
            if not isinstance(found, int | float) or not found > 0:
                raise GgufError(f"says that `{self.prefix}.{key}` is {found}", _CONVERT_ANEW)
            config[entry] = found
        config["head_dim"] = self._head_dim(config)
        config["rope_parameters"] = self._rope(config)
        config |= architecture.more(config)
        tokens = {name: self._token_id(name) for name in ("bos", "padding")}
        config["bos_token_id"], config["pad_token_id"] = tokens["bos"], tokens["padding"]
        config["eos_token_id"] = end_token_ids(self.header.values)
        return config

    def _get(self, key: str, default: Any = None) -> Any:
        return self.header.values.get(f"{self.prefix}.{key}", default)

    def _token_id(self, name: str) -> Any:
        return self.header.values.get(f"tokenizer.ggml.{name}_token_id")

    def _refuse_unknown(self, architecture: Architecture) -> None:
        known = {*_COMMON_KEYS, *architecture.keys, *_OTHER_KEYS}
        usual = {**_USUAL_VALUES, **architecture.usual}
        for key, value in self.header.values.items():
            head, _, rest = key.partition(".")
            if head != self.prefix or rest in known:
                continue
            if rest in usual and usual[rest] == value:
                continue
            shown = "" if isinstance(value, list) else f" ({value})"
            raise GgufError(
                f"says `{key}`{shown}, which recmas does not know how to compute", _USE_SAFETENSORS
            )

    def _vocab_size(self) -> int:
        tokens = len(self.header.values["tokenizer.ggml.tokens"])
        size = self._get("vocab_size", tokens)
        table = self.header.tensors.get("token_embd.weight")
        rows = table.shape[0] if table is not None else size
        if tokens > rows:
            raise GgufError(
                f"has {tokens} tokens, but an embedding table of {rows} rows",
                "Take the file of another conversion, whose vocabulary is the model's.",
            )
        return int(rows)

    def _head_dim(self, config: Mapping[str, Any]) -> int:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        usual = width // heads if heads else 0
        found = self._get("attention.key_length", usual)
        for key in ("attention.value_length", "rope.dimension_count"):
            other = self._get(key, found)
            if other != found:
                raise GgufError(
                    f"has heads of width {found}, but `{self.prefix}.{key}` is {other}",
                    _USE_SAFETENSORS,
                )
        return int(found)

    def _rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        theta = float(self._get("rope.freq_base", 10_000.0))
        kind = self._get("rope.scaling.type", "none")
        factor = self._get("rope.scaling.factor", 1.0)
        original = self._get("rope.scaling.original_context_length")
        plain = {"rope_type": "default", "rope_theta": theta}
        if "rope_freqs.weight" in self.header.tensors:
            if kind != "none":
                raise GgufError(
                    f"has rotary frequencies of its own and a scaling of type `{kind}`",
                    _USE_SAFETENSORS,
                )
            return _llama3_rope(self.header, theta, config)
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            return plain
        if kind == "linear":
            return plain | {"rope_type": "linear", "factor": float(factor)}
        if kind == "yarn" and original:
            scaled = {"factor": float(factor), "original_max_position_embeddings": original}
            return plain | {"rope_type": "yarn"} | scaled
        raise GgufError(f"scales its rotary embedding by `{kind}`", _USE_SAFETENSORS)


# Llama 3.1 to 3.3 scale rotary frequencies by wavelength. A file holds the divisors alone; these
# are the constants that every one of those models has.
_LLAMA3: Final[Mapping[str, Any]] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SAME: Final = 1e-4  # relative; the divisors were computed in float32


def _llama3_rope(header: GgufHeader, theta: float, config: Mapping[str, Any]) -> dict[str, Any]:
    entry = header.tensors["rope_freqs.weight"]
    pairs = config["head_dim"] // 2
    if entry.type.name != "F32" or entry.shape != (pairs,):
        raise GgufError("has rotary frequencies in an unknown form", _USE_SAFETENSORS)
    with header.path.open("rb") as stream:
        stream.seek(entry.begin)
        divisors = np.frombuffer(stream.read(entry.num_bytes), dtype="<f4")
    factor = round(float(divisors.max()), 4)
    wavelengths = 2 * math.pi * theta ** (2 * np.arange(pairs) / config["head_dim"])
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    original = _LLAMA3["original_max_position_embeddings"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if not np.allclose(divisors, expected, rtol=_SAME, atol=0.0):
        raise GgufError(
            "scales its rotary frequencies in a way that is not that of Llama 3", _USE_SAFETENSORS
        )
    return {**_LLAMA3, "factor": factor, "rope_theta": theta}


def _check_tensors(
    header: GgufHeader, architecture: Architecture, config: Mapping[str, Any]
) -> None:
    """Refuse tensors that are missing, of another shape, or of no place in the model."""
    sizes = _sizes(config)
    rules = dict(architecture.tensors(config["num_hidden_layers"]))
    if config["tie_word_embeddings"]:
        del rules["output.weight"]
    missing = [name for name in rules if name not in header.tensors]
    if missing:
        raise GgufError(
            f"lacks {counted(len(missing), 'tensor')} of its model, such as `{missing[0]}`",
            "Download the model again, or convert it anew.",
        )
    for name, entry in header.tensors.items():
        if name == "rope_freqs.weight":
            continue
        rule = rules.get(name)
        if rule is None:
            raise GgufError(
                f"has the tensor `{name}`, for which `{config['model_type']}` has no place",
                _USE_SAFETENSORS,
            )
        wanted = tuple(sizes[letter] for letter in rule.shape)
        if entry.shape != wanted:
            raise GgufError(
                f"has `{name}` of shape {list(entry.shape)}, where its dimensions say "
                f"{list(wanted)}",
                "Download the model again, or convert it anew.",
            )


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    head = config["head_dim"]
    return {
        "D": config["hidden_size"],
        "H": head,
        "Q": head * config["num_attention_heads"],
        "K": head * config["num_key_value_heads"],
        "F": config["intermediate_size"],
        "V": config["vocab_size"],
        "E": config.get("num_experts", 0),
        "M": config.get("moe_intermediate_size", 0),
    }
