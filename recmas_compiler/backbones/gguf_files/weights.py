"""The weights of a GGUF file in float32, under the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from recmas_compiler.backbones.gguf_files.architectures import ARCHITECTURES, TensorRule
from recmas_compiler.backbones.gguf_files.header import GgufHeader, TensorEntry

_Floats = npt.NDArray[np.float32]


def gguf_weights(header: GgufHeader, config: Mapping[str, Any]) -> Iterator[tuple[str, _Floats]]:
    """Give every parameter of a model with its name.

    Blocks of quantized weights are widened: what they mean is kept exactly.

    Args:
        config: As `config_of` returns it: every tensor has a place, and its shape fits.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.memmap(header.path, mode="r", dtype=np.uint8)

    def widened(entry: TensorEntry) -> _Floats:
        rows = entry.shape[:-1] or (1,)
        stored = raw[entry.begin : entry.begin + entry.num_bytes].reshape(*rows, -1)
        found = dequantize(stored, GGMLQuantizationType(entry.type_id))
        return np.array(found, dtype=np.float32).reshape(entry.shape)

    heads = {"Q": config["num_attention_heads"], "K": config["num_key_value_heads"]}
    architecture = ARCHITECTURES[header.values["general.architecture"]]
    halves: dict[str, _Floats] = {}
    for name, rule in architecture.tensors(config["num_hidden_layers"]):
        if name not in header.tensors:
            continue  # the head, where it is the embedding table
        weight = _as_transformers(widened(header.tensors[name]), rule, heads)
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        target = rule.target.format(layer)
        if rule.part is None:
            yield target, weight
        elif rule.part == 0:
            halves[target] = weight
        else:
            yield target, np.concatenate([halves.pop(target), weight], axis=1)


def _as_transformers(weight: _Floats, rule: TensorRule, heads: Mapping[str, int]) -> _Floats:
    if rule.is_offset:
        return weight - np.float32(1)
    if rule.is_interleaved:
        num_heads = heads[rule.shape[0]]
        pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
    return weight
