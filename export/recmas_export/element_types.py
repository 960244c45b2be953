"""Graphs that compute in 16 bits, and what a CPU makes of them.

Which operator computes in which type is decided here once, by operator; `formats.precisions` says
which types those are. Every operator has operands of one type, and where types meet there is a
Cast, as TensorRT's strongly typed networks want it.

SmolLM2 over 1932 tokens decided what is float32 (cosine of hidden states to float32's, bfloat16 and
float16; losses differ by less than chance): 1 - 4.3e-5 and 1 - 8e-7 as it is; no better with
rotations or gates in float32; 1 - 1.1e-4 with sums over layers in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.experts import IN, OUT, routers
from recmas_export.passes.tidy import free_name
from recmas_export.weights_file import SMALLEST_WEIGHT, memory_of
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.layers import is_rows
from recmas_runtime.formats.precisions import ElementTypes

_WIDE: Final = ir.DataType.FLOAT
_NARROW: Final[Mapping[str, tuple[ir.DataType, Any]]] = {
    "bfloat16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (ir.DataType.FLOAT16, np.float16),
}

# Operators that compute in the type of products, all of their operands that are real numbers.
_ALWAYS: Final = frozenset(
    {"Attention", "Gemm", "MatMulNBits", "RotaryEmbedding", "TensorScatter", IN, OUT}
)
# Those that do so where one operand is a weight: lookups, and products. A product of two computed
# operands has their type.
_WITH_WEIGHT: Final = {"MatMul": 1, "Gather": 0}
# Operators that move numbers and so give the type of their first operand.
_MOVES: Final = frozenset(
    {
        *("Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split"),
        *("Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
# Operators whose result has the type of products where all operands but constants have it.
_FOLLOWS: Final = frozenset(
    {"Add", "Concat", "Gelu", "MatMul", "Mul", "Neg", "Relu", "Sigmoid", "Tanh", "Where"}
)
# Operators that take numbers of every type, whatever they give.
_TAKES_ALL: Final = frozenset({"Cast", "Shape", "Size"})
# On the CPU, operators that take every type as it is.
_ANY_TYPE: Final = (
    (_MOVES - {"Expand"}) | _TAKES_ALL | {"Concat", "If", "Loop", "Scan", "TensorScatter"}
)
# The results of these that are indices.
_INDICES: Final = {"ArgMax": 0, "ArgMin": 0, "NonZero": 0, "TopK": 1}
_COMPARES: Final = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})


class UseElementTypes(InPlacePass):
    """Let a float32 graph compute in the types of a precision.

    1. Products with weights and with what is cached, attention, rotations, cache writes and lookups
       compute in the type of products. Their weights are stored in it; those that share memory, in
       whatever graph, share it afterwards.
    2. What moves numbers has the type of what it moves, and gates have the type of products. What
       was looked up goes on in float32.
    3. All else is float32: norms, sums over layers, angles and their cosines, softmax beside
       attention, the choice of experts, layer states, links.
    4. Inputs and outputs stay float32 but for keys and values.
    5. Where types meet there is one Cast for a value.
    """

    def __init__(self, types: ElementTypes) -> None:
        assert types.norms == types.borders == "float32", "nothing else is written"
        assert types.products == types.caches, "attention reads its caches as they are"
        self._types = types
        # By memory, with the wide array: while it lives, no other array has its address.
        self._made: dict[object, tuple[NDArray[Any], ir.Tensor[Any]]] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        if self._types.is_wide:
            return PassResult(model, modified=False)
        _Narrowing(model.graph, *_NARROW[self._types.products], self._made).run()
        return PassResult(model, modified=True)


class _Narrowing:
    """One graph; `_narrow` has the values that have the type of products."""

    def __init__(
        self,
        graph: ir.Graph,
        dtype: ir.DataType,
        numpy_dtype: Any,
        made: dict[object, tuple[NDArray[Any], ir.Tensor[Any]]],
    ) -> None:
        self._graph, self._dtype, self._numpy_dtype, self._made = graph, dtype, numpy_dtype, made
        self._narrow: set[ir.Value] = set()
        self._looked_up: set[ir.Value] = set()
        self._cached: set[ir.Value] = set()
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._stored: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        graph = self._graph
        for value in graph.inputs:
            if is_rows(value.name or ""):
                self._make_narrow(value)
        in_float32 = set(routers(graph))
        for node in list(graph):
            _tell_types(node)
            operands = [value for value in node.inputs if value is not None and _is_real(value)]
            if node.op_type in _TAKES_ALL:
                continue
            is_narrow = node not in in_float32 and self._computes_narrow(node, operands)
            self._take(node, self._dtype if is_narrow else _WIDE)
            for value in (value for value in node.outputs if _is_real(value)):
                if is_narrow:
                    self._make_narrow(value)
                else:
                    value.type = ir.TensorType(_WIDE)
        for place, value in enumerate(graph.outputs):
            if value in self._narrow and not is_rows((value.name or "").removeprefix("present_")):
                self._widen_output(place, value)
        for value in list(graph.initializers.values()):
            if not value.uses() and value.name is not None and not value.is_graph_input():
                del graph.initializers[value.name]

    def _computes_narrow(self, node: ir.Node, operands: Sequence[ir.Value]) -> bool:
        if node.op_type in _ALWAYS:
            if node.op_type == "TensorScatter":
                self._cached.update(node.outputs)
            return True
        if node.op_type in _WITH_WEIGHT:
            weight = node.inputs[_WITH_WEIGHT[node.op_type]]
            if weight is not None and _is_matrix(weight):
                if node.op_type == "Gather":
                    self._looked_up.update(node.outputs)
                return True
        if node.op_type == "MatMul" and any(value in self._cached for value in operands):
            return True
        if node.op_type in _MOVES:
            if node.inputs[0] in self._cached:
                self._cached.update(node.outputs)
            return node.inputs[0] in self._narrow
        computed = [value for value in operands if value.const_value is None]
        return (
            node.op_type in _FOLLOWS
            and bool(computed)
            and all(v in self._narrow and v not in self._looked_up for v in computed)
        )

    def _make_narrow(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self._dtype)
        self._narrow.add(value)

    def _take(self, node: ir.Node, dtype: ir.DataType) -> None:
        """Give a node all of its real operands in one type."""
        for place, value in enumerate(node.inputs):
            if value is None or not _is_real(value) or (value in self._narrow) == (dtype != _WIDE):
                continue
            is_constant = dtype != _WIDE and value.const_value is not None
            given = self._constant(value) if is_constant else self._cast(value, dtype)
            node.replace_input_with(place, given)

    def _constant(self, value: ir.Value) -> ir.Value:
        """Return a constant in the type of products, stored in it."""
        if value not in self._stored:
            tensor = value.const_value
            assert tensor is not None
            wide = tensor.numpy()
            key = memory_of(wide)
            if key not in self._made:
                self._made[key] = wide, self._rounded(wide, value.name)
            _, made = self._made[key]
            name = free_name(self._graph, f"{value.name}.{self._dtype.name.lower()}")
            stored = ir.Value(
                name=name, type=ir.TensorType(self._dtype), shape=made.shape, const_value=made
            )
            self._graph.register_initializer(stored)
            self._stored[value] = stored
        return self._stored[value]

    def _rounded(self, wide: NDArray[Any], name: str | None) -> ir.Tensor[Any]:
        with np.errstate(over="ignore"):
            narrow = wide.astype(self._numpy_dtype)
        # A mask's number for what is not seen may become an infinity.
        if wide.size >= SMALLEST_WEIGHT and not np.isfinite(narrow.astype(np.float32)).all():
            kind = self._dtype.name.lower()
            raise fail(
                "RM202",
                f"the backbone has weights that {kind} cannot hold, in {name!r}",
                hint="Use precision bfloat16 or float32.",
            )
        return ir.Tensor(narrow, dtype=self._dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        key = value, dtype
        if key not in self._casts:
            self._casts[key] = _cast_behind(self._graph, value, dtype)
        return self._casts[key]

    def _widen_output(self, place: int, value: ir.Value) -> None:
        name = value.name
        wide = self._cast(value, _WIDE)
        value.name, wide.name = f"{name}.narrow", name
        self._graph.outputs[place] = wide


class ComputeWide(InPlacePass):
    """Compute in float32 what a CPU has no kernels for, and round where the graph says so.

    1. An operator with a result of 16 bits computes it in float32, and a Cast rounds it.
    2. What moves numbers stays as it is, and so do caches and weights.

    A CPU so computes what a GPU does but for the order of sums: every result is rounded once.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place, within subgraphs too."""
        for graph in list(_graphs(model.graph)):
            for node in list(graph):
                _compute_wide(graph, node)
        return PassResult(model, modified=True)


def _compute_wide(graph: ir.Graph, node: ir.Node) -> None:
    if node.op_type in _ANY_TYPE:
        return
    before, after = Tape(), Tape()
    for place, value in enumerate(node.inputs):
        if value is not None and _is_narrow(value):
            wide = before.op("Cast", (value,), {"to": _WIDE})
            wide.type, wide.shape = ir.TensorType(_WIDE), value.shape
            node.replace_input_with(place, wide)
    graph.insert_before(node, before.nodes)
    for value in node.outputs:
        if not _is_narrow(value):
            continue
        assert value.dtype is not None
        rounded = after.op("Cast", (value,), {"to": value.dtype})
        rounded.type, rounded.shape = ir.TensorType(value.dtype), value.shape
        value.type = ir.TensorType(_WIDE)
        for user, place in list(value.uses()):
            if user is not rounded.producer():
                user.replace_input_with(place, rounded)
        for place, output in enumerate(graph.outputs):
            if output is value:
                value.name, rounded.name = f"{value.name}.wide", value.name
                graph.outputs[place] = rounded
    graph.insert_after(node, after.nodes)


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _graphs(attribute.as_graph())


def _cast_behind(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a value in another type, computed right behind it."""
    tape = Tape()
    cast = tape.op("Cast", (value,), {"to": dtype})
    cast.type, cast.shape = ir.TensorType(dtype), value.shape
    cast.name = f"{value.name}.as_{dtype.name.lower()}"
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.insert_after(producer, tape.nodes)
    return cast


def _tell_types(node: ir.Node) -> None:
    """Give results that the exporter left without a type the one that they have.

    That is the type of real operands where there are some, else that of the first one.
    """
    operands = [v for v in node.inputs if v is not None and v.dtype is not None]
    known = next((v.dtype for v in operands if _is_real(v)), None)
    if node.op_type == "Cast":
        known = ir.DataType(node.attributes["to"].as_int())
    elif node.op_type == "ConstantOfShape":
        filled = node.attributes.get("value")
        known = _WIDE if filled is None else filled.as_tensor().dtype
    elif node.op_type in _COMPARES:
        known = ir.DataType.BOOL
    elif node.op_type in ("Shape", "Size"):
        known = ir.DataType.INT64
    elif known is None and operands:
        known = operands[0].dtype
    for place, value in enumerate(node.outputs):
        is_index = _INDICES.get(node.op_type) == place
        found = ir.DataType.INT64 if is_index else known
        if value.type is None and found is not None:
            value.type = ir.TensorType(found)


def _is_real(value: ir.Value) -> bool:
    return value.dtype == _WIDE or _is_narrow(value)


def _is_narrow(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def _is_matrix(value: ir.Value) -> bool:
    return value.const_value is not None and len(value.const_value.shape) == 2
