"""Packed products: matrices that multiply the same input become one.

One large product reads its weights as fast as memory gives them; small ones have gaps between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_export.passes.splice import insert, take_over


@dataclass(frozen=True)
class _Product:
    """x W, or x W + b.

    Attributes:
        matmul: The product.
        result: The value that others read: the sum where there is a bias.
        weight: W [in, out].
        bias: b [out], or None.
    """

    matmul: ir.Node
    result: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def columns(self) -> int:
        """Width of the result."""
        return int(_array(self.weight).shape[1])


def pack_products(graph: ir.Graph) -> None:
    """Join products of the same input into one whose result is split, in place.

    Queries, keys and values are packed so, and the gate and up projections.
    """
    by_input: dict[ir.Value, list[_Product]] = {}
    for node in graph:
        found = _product(node)
        if found is not None and node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(found)
    for source, products in by_input.items():
        for group in ([p for p in products if p.bias], [p for p in products if not p.bias]):
            if len(group) > 1:
                _pack(graph, source, group)


def _product(node: ir.Node) -> _Product | None:
    """Return the product with a constant matrix that a node is, with its bias; else None."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None
    result = node.outputs[0]
    uses = list(result.uses())
    if len(uses) == 1 and uses[0][0].op_type == "Add" and not result.is_graph_output():
        total, place = uses[0]
        bias = total.inputs[1 - place]
        if bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1:
            return _Product(node, total.outputs[0], weight, bias)
    return _Product(node, result, weight, None)


def _pack(graph: ir.Graph, source: ir.Value, group: list[_Product]) -> None:
    tape = Tape()
    first = group[0]
    weights = np.concatenate([_array(p.weight) for p in group], axis=1)
    packed = tape.op("MatMul", (source, _constant(tape, weights, f"{first.weight.name}.packed")))
    biases = [p.bias for p in group if p.bias is not None]
    if biases:
        total = np.concatenate([_array(b) for b in biases])
        packed = tape.op("Add", (packed, _constant(tape, total, f"{biases[0].name}.packed")))
    widths = np.array([p.columns for p in group])
    sizes = _constant(tape, widths, f"{first.weight.name}.widths")
    parts = tape.op_multi_out("Split", (packed, sizes), {"axis": -1}, num_outputs=len(group))
    insert(graph, tape, before=first.matmul)
    if (rows := first.result.shape) is not None:
        packed.shape = ir.Shape((*rows[:-1], int(widths.sum())))
        packed.type = first.result.type
    for product, part in zip(group, parts, strict=True):
        take_over(part, product.result)
    for product in group:
        used = [product.result.producer(), product.matmul]
        graph.remove([node for node in dict.fromkeys(used) if node is not None], safe=True)
        for old in (product.weight, product.bias):
            if old is not None and old.name is not None and not old.uses():
                graph.initializers.pop(old.name, None)


def _array(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(
    tape: Tape, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], name: str
) -> ir.Value:
    return tape.initializer(ir.tensor(array, name=name))
