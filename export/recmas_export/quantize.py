"""Weights in blocks of small integers, for engines on the CPU.

A latent step reads every weight once, so its time is their bytes over the memory's bandwidth. ONNX
Runtime's own quantizer turns each block of weights that one output adds up into integers and a
scale; its operators MatMulNBits and GatherBlockQuantized read them as they are. Norms, biases,
activations, caches and links stay float32.

Blocks have no zero points: those cost bytes, and without them the quantizer finds the very scales
that `compensated_rounding` has chosen. What they would gain is small (docs/bundle.md).

The experts of a layer are stacked matrices. QMoE reads them where it has their activation; the form
in standard operators reads the same blocks with MatMulNBits and GatherBlockQuantized.

Shape legend: E experts, K inputs and N outputs of a product, V vocabulary, d width, n blocks of K,
b bytes of a block.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.experts import BITS, BLOCK, mixtures, routers
from recmas_export.passes.tidy import MICROSOFT
from recmas_export.weights_file import SMALLEST_WEIGHT, memory_of
from recmas_runtime.engines.onnx.session import onnx_runtime

# Activations are rounded to 8 bits per block too, so that products are those of integers: in int8
# the other levels take ten times as long. Every row has blocks of its own, so that what it becomes
# does not depend on the rest of its batch.
_ACCURACY_LEVEL: Final = 4


@dataclass(frozen=True, kw_only=True)
class _Blocks:
    """A quantized weight, with what it was made from: so its address stays its own.

    Elements are uint8 [N, n, b], low bits first, scales float32 [N, n].
    """

    wide: NDArray[Any]
    bits: int
    block_size: int
    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]


class QuantizeWeights(InPlacePass):
    """Hold weights in blocks of integers.

    1. A product with a weight becomes a MatMulNBits.
    2. A lookup in a table of weights becomes a GatherBlockQuantized.
    3. Weights that share memory, in whatever graph, are quantized once and share it afterwards.
    4. Matrices of experts are quantized, in blocks of a size of their own, where both of their
       widths are whole numbers of blocks, which QMoE asks for: a MoE becomes one, and in the other
       form products get blocks and scales.
    5. What chooses experts stays float32: a rounding that swaps two of them is no small one.
    6. Without a block size, for weights that stay numbers of their own, nothing changes.

    Weights are float32 and still inside the graph.
    """

    def __init__(
        self, *, bits: int, block_size: int | None, expert_block_size: int | None = None
    ) -> None:
        self._bits, self._block_size = bits, block_size
        self._expert_size = expert_block_size or block_size
        self._made: dict[object, _Blocks] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        if self._block_size is None or self._expert_size is None:  # 6
            return PassResult(model, modified=False)
        for mixture in list(mixtures(model.graph)):  # 4
            if not any(width % self._expert_size for width in (mixture.width, mixture.inner)):
                for node in (mixture.first, mixture.last):
                    self._quantize_product(model.graph, node, self._expert_size)
        choosing = set(routers(model.graph))
        for node in list(model.graph):
            if node.op_type == "MoE":
                self._quantize_mixture(model.graph, node, self._expert_size)
            elif node not in choosing:  # 5
                self._rewrite(model.graph, node, self._block_size)
        model.graph.opset_imports[MICROSOFT] = 1
        for value in list(model.graph.initializers.values()):
            if not value.uses():
                del model.graph.initializers[value.name or ""]
        return PassResult(model, modified=True)

    def _rewrite(self, graph: ir.Graph, node: ir.Node, block_size: int) -> None:
        weight = _weight_of(node)
        if weight is None or weight.const_value is None:
            return
        array = weight.const_value.numpy()
        # A MatMul has its weight as [K, N], a Gemm with `transB` as [N, K]; tables are [V, d].
        is_KN = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _gemm(node)["transB"])
        weight_NK = array.T if is_KN else array
        blocks = self._blocks(weight_NK, block_size)
        tape = Tape()
        write = _lookup if node.op_type == "Gather" else _product
        result = write(tape, node, weight, blocks)
        _replace(graph, node, tape, result)

    def _blocks(self, weight_NK: NDArray[Any], block_size: int) -> _Blocks:
        key = memory_of(weight_NK)  # 3
        if key not in self._made:
            self._made[key] = _quantized(weight_NK, self._bits, block_size)
        return self._made[key]

    def _quantize_product(self, graph: ir.Graph, node: ir.Node, block_size: int) -> None:
        """Let a product with experts have packed matrices [E, N, n, b] and, last, scales."""
        tape = Tape()
        packed, scales = self._stacked(tape, node.inputs[2], block_size)
        _register(graph, tape)
        node.replace_input_with(2, packed)
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, scales)
        for name, value in ((BITS, self._bits), (BLOCK, block_size)):
            node.attributes[name] = ir.AttrInt64(name, value)

    def _quantize_mixture(self, graph: ir.Graph, node: ir.Node, block_size: int) -> None:
        """Write a MoE as the QMoE with packed matrices [E, N, n b]."""
        x, logits, first, first_bias, last, last_bias = (*node.inputs, None)[:6]
        if any(_last_size(matrices) % block_size for matrices in (first, last)):
            return
        tape = Tape()
        (packed, scales), (last_packed, last_scales) = (
            self._stacked(tape, matrices, block_size, flat=True) for matrices in (first, last)
        )
        has_level = {"accuracy_level": _ACCURACY_LEVEL} if _is_level_known() else {}
        result = tape.op(
            "QMoE",
            (x, logits, packed, scales, first_bias, last_packed, last_scales, last_bias),
            {
                **{name: attribute.value for name, attribute in node.attributes.items()},
                "expert_weight_bits": self._bits,
                "block_size": block_size,
                **has_level,
            },
            domain=MICROSOFT,
        )
        _replace(graph, node, tape, result)

    def _stacked(
        self, tape: Tape, matrices: ir.Value | None, block_size: int, *, flat: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """Return packed matrices [E, N, n, b], or [E, N, n b], and scales [E, N, n]."""
        assert matrices is not None
        assert matrices.const_value is not None
        array_ENK = matrices.const_value.numpy()
        num_experts, num_outputs, num_inputs = array_ENK.shape
        blocks = self._blocks(array_ENK.reshape(-1, num_inputs), block_size)
        shape = (num_experts, num_outputs, num_inputs // block_size)
        packed = blocks.packed.reshape(*(shape[:2] if flat else shape), -1)
        name = _name(matrices, blocks)
        return (
            tape.initializer(ir.Tensor(packed, name=name)),
            tape.initializer(ir.Tensor(blocks.scales.reshape(shape), name=f"{name}.scales")),
        )


def _register(graph: ir.Graph, tape: Tape) -> None:
    for initializer in tape.initializers:
        if initializer.name not in graph.initializers:
            graph.register_initializer(initializer)


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, result: ir.Value) -> None:
    """Let the nodes of a tape compute what a node has computed."""
    _register(graph, tape)
    replaced = node.outputs[0]
    result.name, result.type, result.shape = replaced.name, replaced.type, replaced.shape
    graph.insert_before(node, tape.nodes)
    replaced.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _last_size(value: ir.Value | None) -> int:
    assert value is not None
    assert value.const_value is not None
    return int(value.const_value.shape.numpy()[-1])


@functools.cache
def _is_level_known() -> bool:
    """Whether this ONNX Runtime's QMoE has a level of accuracy; before 1.31 it has none."""
    onnx_runtime()
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    schemas = (schema for schema in get_all_operator_schema() if schema.name == "QMoE")
    return any("accuracy_level" in schema.attributes for schema in schemas)


def _weight_of(node: ir.Node) -> ir.Value | None:
    """Return the matrix that a node multiplies with or looks up in, if it has one."""
    places = {"MatMul": 1, "Gemm": 1, "Gather": 0}
    if node.op_type not in places:
        return None
    weight = node.inputs[places[node.op_type]]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return None
    tensor = weight.const_value
    if tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2 or tensor.size < SMALLEST_WEIGHT:
        return None
    if node.op_type == "Gemm":
        form = _gemm(node)
        if form["transA"] or form["alpha"] != 1 or form["beta"] != 1:
            return None
    return weight


def _gemm(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a Gemm, with those that are not written."""
    usual = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return usual | {name: attribute.value for name, attribute in node.attributes.items()}


def _product(tape: Tape, node: ir.Node, weight: ir.Value, blocks: _Blocks) -> ir.Value:
    """Return activation [..., K] times weight: [..., N]; a Gemm's bias is added."""
    num_outputs, num_inputs = blocks.wide.shape
    product = tape.op(
        "MatMulNBits",
        (node.inputs[0], *_operands(tape, weight, blocks, blocks.packed)),
        {
            "K": num_inputs,
            "N": num_outputs,
            "bits": blocks.bits,
            "block_size": blocks.block_size,
            "accuracy_level": _ACCURACY_LEVEL,
        },
        domain=MICROSOFT,
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return product if bias is None else tape.op("Add", (product, bias))


def _lookup(tape: Tape, node: ir.Node, weight: ir.Value, blocks: _Blocks) -> ir.Value:
    """Return rows [..., d] of the table [V, d] as float32."""
    num_rows, width = blocks.wide.shape
    table, scales = _operands(tape, weight, blocks, blocks.packed.reshape(num_rows, -1))
    rows = tape.op(
        "GatherBlockQuantized",
        (table, node.inputs[1], scales),
        {
            "gather_axis": 0,
            "quantize_axis": 1,
            "bits": blocks.bits,
            "block_size": blocks.block_size,
        },
        domain=MICROSOFT,
    )
    if width % blocks.block_size == 0:
        return rows
    # The last block of a row is filled up, for the table and the head to be the same bytes.
    bounds = (
        tape.initializer(ir.tensor([value], dtype=ir.DataType.INT64, name=f"{weight.name}.{name}"))
        for name, value in (("first", 0), ("width", width), ("axis", -1))
    )
    return tape.op("Slice", (rows, *bounds))


def _operands(
    tape: Tape, weight: ir.Value, blocks: _Blocks, packed: NDArray[np.uint8]
) -> tuple[ir.Value, ir.Value]:
    """Return elements and scales as initializers, named after their weight."""
    name = _name(weight, blocks)
    elements = tape.initializer(ir.Tensor(packed, name=name))
    return elements, tape.initializer(ir.Tensor(blocks.scales, name=f"{name}.scales"))


def _name(weight: ir.Value, blocks: _Blocks) -> str:
    """Return the name of elements: graphs may hold one weight in blocks of several sizes."""
    return f"{weight.name}.int{blocks.bits}.{blocks.block_size}"


def _quantized(weight_NK: NDArray[Any], bits: int, block_size: int) -> _Blocks:
    quantizer = _onnx_runtime_quantizer(bits, block_size)
    packed, scales, _ = quantizer.qbits_block_quant(np.ascontiguousarray(weight_NK.T))
    num_outputs, num_blocks = len(weight_NK), -(-weight_NK.shape[1] // block_size)
    return _Blocks(
        wide=weight_NK,
        bits=bits,
        block_size=block_size,
        packed=packed.reshape(num_outputs, num_blocks, -1),
        scales=scales.reshape(num_outputs, num_blocks),
    )


def _onnx_runtime_quantizer(bits: int, block_size: int) -> Any:
    onnx_runtime()  # turns its telemetry off before anything imports it
    root = logging.getLogger()
    silence = logging.NullHandler()
    # On import the module sets up logging of the whole process, unless someone has done so.
    root.addHandler(silence)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )
    finally:
        root.removeHandler(silence)
    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    return DefaultWeightOnlyQuantizer(config)
