"""Products of integers by rows, for prompts: ONNX Runtime multiplies them fastest of all.

MatMulNBits reads weights in blocks and gains nothing over many rows. MatMulIntegerToFloat takes
8-bit integers with one scale a channel of the weight and one for all activations, and so uses the
processor's products of integers whole. One scale for all activations would ruin them, for one
position's states can be a thousand times those of others. So each row is divided by its largest
element before and multiplied by it behind: every row has a scale of its own, and what it becomes
depends on nothing else in the call.

Channels of an input differ too. Where a norm with weights of its own makes the input, they are made
more alike: the norm's weights are divided and the matrix's rows multiplied by the same numbers
(SmoothQuant, Xiao et al., arXiv 2211.10438), which costs nothing in a run. What a gate makes has
elements far larger than all others of its row, beside which 8 bits have nothing left: such products
are left to blocks, whose activations have a scale for each block too. Two rows of 8 bits for each
of theirs lose as little, but take longer: a step of SmolLM2 1.6 times, a prompt as long or longer.

Shape legend: R rows, K inputs and N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.experts import mixtures
from recmas_export.passes.tidy import MICROSOFT, insert, take_over

# Largest magnitude of an integer, the same for weights and activations.
_LARGEST: Final = 127
# Activations are unsigned, which is the form that x64 processors multiply with signed weights.
_ZERO_POINT: Final = 128
_CHOICES: Final = frozenset({"MoE", "TopK"})
_NORMS: Final = frozenset({"RMSNormalization", "LayerNormalization"})
# How much of a channel's size goes from the input to the weight. SmolLM2 loses least at 0.75.
_MIGRATED: Final = 0.75


class QuantizeRows(InPlacePass):
    """Multiply rows of integers with weights of integers.

    1. MatMul(x, W) with a weight becomes Mul(MatMulIntegerToFloat(q, Wq), m): m [R, 1] is the
       largest magnitude of each row of x, and q is x / m in 8 bits.
    2. Products of the same input share m and q.
    3. Where the only user of a norm is such a product, the channels of its input are made alike.
    4. Where a product of activations makes the input, as gates do, the MatMul stays for blocks.
    5. What is no MatMul stays as it is, and so does a graph that chooses experts.
    6. A row of zeros is divided by zero: its integers are any, and it is zeros when they have been
       multiplied by its magnitude.

    Weights are float32 and still inside the graph; those of a norm are replaced, never changed.
    """

    def __init__(self, peaks: Mapping[str, NDArray[np.float32]]) -> None:
        """See `rounding.input_peaks`; a weight without an entry is quantized as it is."""
        self._peaks = peaks

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place; weights that are then unused leave the graph."""
        graph, rows = model.graph, dict[ir.Value, _Rows]()
        if any(node.op_type in _CHOICES for node in graph) or any(mixtures(graph)):  # 5
            return PassResult(model, modified=False)
        found = [(node, w) for node in graph if (w := _weight_of(node)) is not None]
        products = [(node, w) for node, w in found if not _is_gated(node.inputs[0])]  # 4
        for node, weight in products:
            weight_KN = self._smoothed(graph, node, weight)
            source = node.inputs[0]
            assert source is not None
            if source not in rows:  # 2
                tape = Tape()
                rows[source] = _rows_of(graph, tape, source)
                insert(graph, tape, before=node)
            tape = Tape()
            result = _product(graph, tape, rows[source], weight, weight_KN)
            insert(graph, tape, before=node)
            take_over(result, node.outputs[0])
            graph.remove(node, safe=True)
        if products:
            graph.opset_imports[MICROSOFT] = 1
        for value in list(graph.initializers.values()):
            if not value.uses():
                del graph.initializers[value.name or ""]
        return PassResult(model, bool(products))

    def _smoothed(self, graph: ir.Graph, node: ir.Node, weight: ir.Value) -> NDArray[np.float32]:
        """Return the weight [K, N], with channels of its input made alike where that is free."""
        assert weight.const_value is not None
        weight_KN = np.asarray(weight.const_value.numpy(), np.float32)
        peaks = self._peaks.get(_module_of(weight))
        norm = node.inputs[0].producer() if node.inputs[0] is not None else None
        if peaks is None or norm is None or norm.op_type not in _NORMS:
            return weight_KN
        parameters = [value for value in norm.inputs[1:] if value is not None]
        only_user = len(norm.outputs[0].uses()) == 1 and not norm.outputs[0].is_graph_output()
        if not only_user or any(value.const_value is None for value in parameters):
            return weight_KN
        factors_K = smoothing(peaks, weight_KN)
        for place, value in enumerate(norm.inputs[1:], start=1):
            if value is not None and value.const_value is not None:
                smooth = value.const_value.numpy() / factors_K
                name = f"{value.name}.smooth.{_module_of(weight)}"
                norm.replace_input_with(place, _constant(graph, name, smooth.astype(np.float32)))
        return weight_KN * factors_K[:, None]


class _Rows(NamedTuple):
    """Rows of an input: magnitudes [B, S, 1], and the rows divided by them in 8 bits [B, S, K]."""

    scales: ir.Value
    integers: ir.Value


def smoothing(peaks_K: NDArray[np.float32], weight_KN: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what each channel of an input is divided by; their geometric mean is 1.

    The peaks are the largest shares that the channels have in a row's largest element.
    """
    tiny = np.finfo(np.float32).tiny
    weights_K = np.maximum(np.abs(weight_KN).max(axis=1), tiny)
    inputs_K = np.maximum(peaks_K, peaks_K.max() * 1e-4)
    logs_K = _MIGRATED * np.log(inputs_K) - (1 - _MIGRATED) * np.log(weights_K)
    # A channel without weights must not move the others.
    logs_K = np.where(weights_K > tiny, logs_K, np.median(logs_K))
    return np.asarray(np.exp(logs_K - logs_K.mean()), np.float32)


def quantized_channels(
    weight_KN: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return a weight as the nearest integers [K, N] and the scale of each channel [N]."""
    largest_N = np.abs(weight_KN).max(axis=0)
    scales_N = np.where(largest_N > 0, largest_N / _LARGEST, 1).astype(np.float32)
    return np.rint(weight_KN / scales_N).astype(np.int8), scales_N


def _rows_of(graph: ir.Graph, tape: Tape, source: ir.Value) -> _Rows:
    last_axis = _constant(graph, "rows.last_axis", np.array([-1], np.int64))
    largest = tape.op("ReduceMax", (tape.op("Abs", (source,)), last_axis), {"keepdims": 1})
    unit = tape.op("Div", (source, largest))  # 6
    return _Rows(largest, tape.op("QuantizeLinear", (unit, *_unit_scale(graph))))


def _product(
    graph: ir.Graph, tape: Tape, rows: _Rows, weight: ir.Value, weight_KN: NDArray[np.float32]
) -> ir.Value:
    integers_KN, scales_N = quantized_channels(weight_KN)
    scale, zero_point = _unit_scale(graph)
    product = tape.op(
        "MatMulIntegerToFloat",
        (
            rows.integers,
            _constant(graph, f"{weight.name}.rows", integers_KN),
            scale,
            _constant(graph, f"{weight.name}.rows.scales", scales_N),
            zero_point,
        ),
        domain=MICROSOFT,
    )
    return tape.op("Mul", (product, rows.scales))


def _unit_scale(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Return scale and zero point of rows whose largest magnitude is 1."""
    return (
        _constant(graph, "rows.scale", np.array(1 / _LARGEST, np.float32)),
        _constant(graph, "rows.zero_point", np.array(_ZERO_POINT, np.uint8)),
    )


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Return an initializer of the graph, the one of this name if there is one."""
    if name not in graph.initializers:
        tensor = ir.Tensor(array, name=name)
        graph.register_initializer(
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(array.shape),
                const_value=tensor,
            )
        )
    return graph.initializers[name]


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return the matrix that a node multiplies with, if it has one."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    tensor = weight.const_value
    return weight if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 else None


def _is_gated(source: ir.Value | None) -> bool:
    producer = source.producer() if source is not None else None
    return producer is not None and producer.op_type == "Mul"


def _module_of(weight: ir.Value) -> str:
    """Return the module whose weight this is; of a packed one the first."""
    return (weight.name or "").partition(".weight")[0]
