"""Weights in blocks of small integers, for engines on the CPU.

A latent step reads every weight once, so its time is their bytes over the memory's bandwidth. ONNX
Runtime's own quantizer turns each block of weights that one output adds up into integers and a
scale; its operators MatMulNBits and GatherBlockQuantized read them as they are. Norms, biases,
activations, caches and links stay float32.

Blocks have no zero points: those cost bytes, and without them the quantizer finds the very scales
that `compensated_rounding` has chosen. What they would gain is small (docs/bundle.md).

Shape legend: K inputs and N outputs of a product, V vocabulary, d width, n blocks of K, b bytes of
a block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.weights_file import SMALLEST_WEIGHT, memory_of
from recmas_runtime.engines.onnx.session import onnx_runtime

_DOMAIN: Final = "com.microsoft"

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
    4. Without a block size, for weights that stay numbers of their own, nothing changes.

    Weights are float32 and still inside the graph.
    """

    def __init__(self, *, bits: int, block_size: int | None) -> None:
        self._bits, self._block_size = bits, block_size
        self._made: dict[object, _Blocks] = {}

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        if self._block_size is None:  # 4
            return PassResult(model, modified=False)
        for node in list(model.graph):
            self._rewrite(model.graph, node, self._block_size)
        model.graph.opset_imports[_DOMAIN] = 1
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
        key = memory_of(weight_NK)  # 3
        if key not in self._made:
            self._made[key] = _quantized(weight_NK, self._bits, block_size)
        blocks = self._made[key]
        tape = Tape()
        write = _lookup if node.op_type == "Gather" else _product
        result = write(tape, node, weight, blocks)
        for initializer in tape.initializers:
            if initializer.name not in graph.initializers:
                graph.register_initializer(initializer)
        replaced = node.outputs[0]
        result.name, result.type, result.shape = replaced.name, replaced.type, replaced.shape
        graph.insert_before(node, tape.nodes)
        replaced.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


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
        domain=_DOMAIN,
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
        domain=_DOMAIN,
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
    name = f"{weight.name}.int{blocks.bits}"
    elements = tape.initializer(ir.Tensor(packed, name=name))
    return elements, tape.initializer(ir.Tensor(blocks.scales, name=f"{name}.scales"))


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
