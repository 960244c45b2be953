"""Weights in a smaller element type: half the file, the same numbers.

A backbone's weights are rounded when it is loaded, so storing them narrowly loses nothing. A Cast
behind each makes them float32 again, in which engines compute. ONNX Runtime folds these casts when
it opens a graph; the measured cost is load time (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_export.graph.weights_file import SMALLEST_WEIGHT, memory_of

_NARROW: Final[dict[str, tuple[ir.DataType, Any]]] = {
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (ir.DataType.FLOAT16, np.float16),
}


def narrow_weights(models: Sequence[ir.Model], dtype: str) -> None:
    """Store every weight in `dtype` that it holds exactly, in place; the others stay float32.

    Args:
        models: Their weights are float32. Weights that share memory share it afterwards too.
        dtype: `float32` changes nothing.
    """
    if dtype not in _NARROW:
        return
    # By memory, with the wide array: while it lives, no other array has its address.
    seen: dict[object, tuple[Any, ir.Tensor[Any] | None]] = {}
    for model in models:
        for value in list(model.graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST_WEIGHT:
                continue
            wide = tensor.numpy()
            key = memory_of(wide)
            if key not in seen:
                seen[key] = wide, _narrowed(wide, dtype)
            _, narrow = seen[key]
            if narrow is not None:
                _replace(model.graph, value, narrow)


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
    for node in [node for node, place in value.uses() if _picks_rows(node, place)]:
        _cast_rows(graph, node, stored)
    if value.uses():
        tape = Tape()
        wide = _cast(tape, stored)
        wide.name, wide.shape = f"{name}.wide", narrow.shape
        graph.insert_before(graph[0], tape.nodes)
        value.replace_all_uses_with(wide)
    del graph.initializers[name]


def _picks_rows(node: ir.Node, place: int) -> bool:
    return node.op_type == "Gather" and place == 0


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
