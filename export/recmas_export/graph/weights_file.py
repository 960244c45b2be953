"""One safetensors file that several ONNX graphs point into as their external data.

A safetensors file is a header and then raw little-endian tensors, so an ONNX initializer can name
the same bytes by offset and length. Weights are on disk once, whoever reads them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# Readers map the file, so tensors start on multiples of what vector units and mappings like. The
# format allows no holes between tensors, hence the header is padded and odd sizes come last.
_DATA_ALIGNMENT: Final = 4096
_TENSOR_ALIGNMENT: Final = 64

# Fewer elements than this stay inside the graph: shapes, scalars, epsilons.
SMALLEST_WEIGHT: Final = 16

_SAFETENSORS_NAMES: Final = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.UINT8: "U8",
}


Memory = tuple[int, tuple[int, ...], tuple[int, ...]]


def memory_of(array: NDArray[Any]) -> Memory:
    """Return what tells whether two living arrays are the same memory: address, shape, strides."""
    return array.ctypes.data, array.shape, array.strides


@dataclass(frozen=True)
class _Weight:
    """An initializer and its array, kept alive so that its address stays its own."""

    value: ir.Value
    dtype: ir.DataType
    array: NDArray[Any]

    @property
    def name(self) -> str:
        assert self.value.name is not None
        return self.value.name

    @property
    def memory(self) -> object:
        """What tells whether two weights are the same bytes, in whatever shape."""
        if self.array.flags.c_contiguous:
            return self.array.ctypes.data, self.array.nbytes
        return memory_of(self.array)


def externalize_weights(models: Sequence[ir.Model], path: Path) -> None:
    """Write the weights of all `models` to one safetensors file and make the models point into it.

    Initializers that are the same memory (a tied head and embedding) are stored once. Equal weights
    give equal bytes.

    Args:
        models: Changed in place: weights become external data of the file's name, so the graphs
            must be saved beside it.
        path: Where to write.

    Raises:
        OSError: The file cannot be written.
    """
    weights = [w for model in models for w in _weights(model.graph)]
    distinct: dict[object, _Weight] = {}
    for weight in weights:
        distinct.setdefault(weight.memory, weight)
    stored = sorted(
        distinct.values(), key=lambda w: (w.array.nbytes % _TENSOR_ALIGNMENT != 0, w.name)
    )
    starts = np.cumsum([0, *(w.array.nbytes for w in stored)]).tolist()
    header = _header(stored, starts)
    with path.open("wb") as file:
        file.write(header)
        for weight in stored:
            # One at a time: transposed views become copies here, never all of them at once.
            # Not `tofile`: on a full disk its error does not say so.
            file.write(np.ascontiguousarray(weight.array).reshape(-1).view(np.uint8).data)
    offsets = {w.memory: len(header) + start for w, start in zip(stored, starts, strict=False)}
    for weight in weights:
        weight.value.const_value = ir.ExternalTensor(
            location=path.name,
            offset=offsets[weight.memory],
            length=weight.array.nbytes,
            dtype=weight.dtype,
            shape=ir.Shape(weight.array.shape),
            name=weight.name,
            base_dir=path.parent,
        )


def _weights(graph: ir.Graph) -> list[_Weight]:
    """Return the initializers that belong in the weights file rather than in the graph."""
    tensors = ((value, value.const_value) for value in graph.initializers.values())
    return [
        _Weight(value, tensor.dtype, tensor.numpy())
        for value, tensor in tensors
        if tensor is not None
        and tensor.dtype in _SAFETENSORS_NAMES
        and tensor.size >= SMALLEST_WEIGHT
    ]


def _header(stored: Sequence[_Weight], starts: Sequence[int]) -> bytes:
    """Return the file up to its first tensor; `starts` has one entry more, the end of the last."""
    entries = {
        weight.name: {
            "dtype": _SAFETENSORS_NAMES[weight.dtype],
            "shape": list(weight.array.shape),
            "data_offsets": [start, end],
        }
        for weight, start, end in zip(stored, starts[:-1], starts[1:], strict=True)
    }
    assert len(entries) == len(stored), "two weights of one name"
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = -(-(len(text) + 8) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT - 8
    return struct.pack("<Q", padded) + text.ljust(padded)
