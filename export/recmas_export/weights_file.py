"""How weights are stored: in which element type, and in one file for all graphs.

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

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

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
    ir.DataType.INT8: "I8",
}

_NARROW: Final[dict[str, tuple[ir.DataType, Any]]] = {
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (ir.DataType.FLOAT16, np.float16),
}

Memory = tuple[int, tuple[int, ...], tuple[int, ...]]


def memory_of(array: NDArray[Any]) -> Memory:
    """Return what tells whether two living arrays are the same memory: address, shape, strides."""
    return array.ctypes.data, array.shape, array.strides


class NarrowWeights(InPlacePass):
    """Store weights in a smaller element type: half the file, the same numbers.

    1. A float32 weight that `dtype` holds exactly is stored in it, with a Cast to float32 behind
       it; the others stay float32. A backbone's weights are rounded when it is loaded, so that
       storing them narrowly loses nothing.
    2. A lookup picks rows of the narrow table and casts those, not all of the table.
    3. Weights that share memory, in whatever graph, share it afterwards too.

    Engines compute in float32. ONNX Runtime folds the casts when it opens a graph; the measured
    cost is load time (docs/benchmarks.md).
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        # By memory, with the wide array: while it lives, no other array has its address.
        self._seen: dict[object, tuple[Any, ir.Tensor[Any] | None]] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        modified = False
        values = list(model.graph.initializers.values()) if self._dtype in _NARROW else []
        for value in values:
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_WEIGHT:
                continue
            wide = tensor.numpy()
            key = memory_of(wide)
            if key not in self._seen:  # 3
                self._seen[key] = wide, _narrowed(wide, self._dtype)
            _, narrow = self._seen[key]
            if narrow is not None:
                _replace(model.graph, value, narrow)
                modified = True
        return PassResult(model, modified)


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

    Weights become external data of the file's name, so the graphs must be saved beside it.
    Initializers that are the same memory (a tied head and embedding) are stored once. Equal weights
    give equal bytes.
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


def _narrowed(wide: np.ndarray[Any, Any], dtype: str) -> ir.Tensor[Any] | None:
    """Return a weight in `dtype`, or None if that would change it."""
    kind, numpy_dtype = _NARROW[dtype]
    with np.errstate(over="ignore"):  # what is too large becomes infinite and compares unequal
        array = wide.astype(numpy_dtype)
    if not np.array_equal(array.astype(np.float32), wide):
        return None
    return ir.Tensor(array, dtype=kind)


def _replace(graph: ir.Graph, value: ir.Value, narrow: ir.Tensor[Any]) -> None:
    """Put a narrow weight and its cast in a weight's place."""
    name = value.name
    assert name is not None, "weights have names"
    stored = ir.Value(
        name=f"{name}.stored",
        type=ir.TensorType(narrow.dtype),
        shape=narrow.shape,
        const_value=narrow,
    )
    graph.register_initializer(stored)
    lookups = [n for n, place in value.uses() if n.op_type == "Gather" and place == 0]
    for node in lookups:
        _cast_rows(graph, node, stored)
    if value.uses():
        tape = Tape()
        wide = _cast(tape, stored)
        wide.name, wide.shape = f"{name}.wide", narrow.shape
        graph.insert_before(graph[0], tape.nodes)
        value.replace_all_uses_with(wide)
    del graph.initializers[name]


def _cast_rows(graph: ir.Graph, node: ir.Node, stored: ir.Value) -> None:
    """Let a Gather read the narrow table, and cast what it picks: not all of the table."""
    tape = Tape()
    picked = node.outputs[0]
    rows = tape.op("Gather", (stored, *node.inputs[1:]), node.attributes)
    rows.name, rows.shape = f"{picked.name}.stored", picked.shape
    rows.type = ir.TensorType(stored.dtype or ir.DataType.UNDEFINED)
    wide = _cast(tape, rows)
    wide.name, wide.shape = picked.name, picked.shape
    graph.insert_before(node, tape.nodes)
    picked.replace_all_uses_with(wide, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _cast(tape: Tape, value: ir.Value) -> ir.Value:
    wide = tape.op("Cast", (value,), {"to": ir.DataType.FLOAT})
    wide.type = ir.TensorType(ir.DataType.FLOAT)
    return wide
