"""Packed products: matrices that multiply the same input become one, and heads are split after it.

One large product reads its weights as fast as memory gives them; small ones have gaps between them.

Shape legend: B samples, S positions, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape

from recmas_export.passes.tidy import free_name, insert, integers, take_over

_HEADS_FIRST = (0, 2, 1, 3)


class PackProducts(InPlacePass):
    """Join products of the same input into one whose result is split.

    1. Queries, keys and values are packed so, and the gate and up projections.
    2. Products with a bias and those without are packed apart.
    3. Packed weights are plain initializers [in, out]; those they are made of leave the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        by_input: dict[ir.Value, list[_Product]] = {}
        for node in model.graph:
            found = _product(node)
            if found is not None and node.inputs[0] is not None:
                by_input.setdefault(node.inputs[0], []).append(found)
        modified = False
        for source, products in by_input.items():
            biased, plain = [p for p in products if p.bias], [p for p in products if not p.bias]
            for group in (biased, plain):  # 2
                if len(group) > 1:
                    _pack(model.graph, source, group)
                    modified = True
        return PassResult(model, modified)


class SplitAfterHeads(InPlacePass):
    """Move a split behind the transposes of its parts, which so become one.

    1. Slices that cut a value into all of its parts are written as one Split.
    2. Split, then for each part Reshape to [B, S, heads, D] and Transpose to [B, heads, S, D], is
       Reshape, Transpose and a Split of heads.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        slices = [node for node in model.graph if node.op_type == "Slice"]
        changed = [_use_split(model.graph, node) for node in slices]  # 1
        splits = [node for node in model.graph if node.op_type == "Split"]
        changed += [_move_split(model.graph, node) for node in splits]  # 2
        return PassResult(model, any(changed))


@dataclass(frozen=True)
class _Product:
    """x W, or x W + b; the result that others read is the sum where there is a bias."""

    matmul: ir.Node
    result: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def columns(self) -> int:
        """Width of the result."""
        return int(_array(self.weight).shape[1])


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
    joined = _constant(graph, tape, weights, f"{first.weight.name}.packed")
    packed = tape.op("MatMul", (source, joined))
    biases = [p.bias for p in group if p.bias is not None]
    if biases:
        total = np.concatenate([_array(b) for b in biases])
        joined = _constant(graph, tape, total, f"{biases[0].name}.packed")
        packed = tape.op("Add", (packed, joined))
    widths = np.array([p.columns for p in group])
    sizes = _constant(graph, tape, widths, f"{first.weight.name}.widths")
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
            if old is not None and old.name is not None and not old.uses():  # 3
                graph.initializers.pop(old.name, None)


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, tape: Tape, array: NDArray[Any], name: str) -> ir.Value:
    # The exporter gives equal weights one name, whatever layers they are in: zero biases, say.
    return tape.initializer(ir.tensor(array, name=free_name(graph, name)))


def _use_split(graph: ir.Graph, node: ir.Node) -> bool:
    """Write slices that cut a value into all of its parts as one split, if they are that."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return False
    slices = [user for user, place in source.uses() if user.op_type == "Slice" and place == 0]
    if slices[0] is not node or len(slices) != len(source.uses()):
        return False
    axis, width = len(source.shape) - 1, source.shape[-1]
    cuts = sorted(cut for s in slices if (cut := _cut(s, axis, width)) is not None)
    starts, ends = [start for start, _ in cuts], [end for _, end in cuts]
    if len(cuts) != len(slices) or len(cuts) < 2 or starts != [0, *ends[:-1]] or ends[-1] != width:
        return False
    tape = Tape()
    sizes = ir.tensor([end - start for start, end in cuts], name=f"{source.name}.widths")
    split = tape.op_multi_out(
        "Split", (source, tape.initializer(sizes)), {"axis": -1}, num_outputs=len(cuts)
    )
    insert(graph, tape, before=node)
    for part, cut in zip(split, cuts, strict=True):
        old = next(s.outputs[0] for s in slices if _cut(s, axis, width) == cut)
        take_over(part, old)
    graph.remove(slices, safe=True)
    return True


def _cut(node: ir.Node, axis: int, width: int | ir.SymbolicDim) -> tuple[int, int] | None:
    """Return where a slice of the given axis starts and ends; None if it is another slice."""
    numbers = [integers(value) for value in node.inputs[1:]]
    match numbers:
        case [[int(start)], [int(end)], [int(along)], [1]] if along % (axis + 1) == axis:
            return (start, min(end, width)) if isinstance(width, int) and start >= 0 else None
    return None


def _move_split(graph: ir.Graph, node: ir.Node) -> bool:
    packed, sizes = node.inputs[0], integers(node.inputs[1]) if len(node.inputs) > 1 else None
    transposes = [_heads_of(part) for part in node.outputs]
    if packed is None or packed.shape is None or sizes is None or None in transposes:
        return False
    heads = [t.outputs[0] for t in transposes if t is not None]
    widths = {value.shape[3] for value in heads if value.shape is not None}
    if len(packed.shape) != 3 or len(widths) != 1 or not isinstance(width := widths.pop(), int):
        return False
    tape = Tape()
    shape = tape.initializer(ir.tensor([0, 0, -1, width], name=f"{packed.name}.heads"))
    counts = [size // width for size in sizes]
    rows = tape.op("Reshape", (packed, shape))
    columns = tape.op("Transpose", (rows,), {"perm": _HEADS_FIRST})
    batch, positions, _ = packed.shape
    rows.shape = ir.Shape((batch, positions, sum(counts), width))
    columns.shape = ir.Shape((batch, sum(counts), positions, width))
    rows.type = columns.type = packed.type
    parts = tape.op_multi_out(
        "Split",
        (columns, tape.initializer(ir.tensor(counts, name=f"{packed.name}.head_counts"))),
        {"axis": 1},
        num_outputs=len(heads),
    )
    insert(graph, tape, before=node)
    for part, old in zip(parts, heads, strict=True):
        take_over(part, old)
    return True


def _heads_of(part: ir.Value) -> ir.Node | None:
    """Return the transpose to [B, heads, S, D] that is all that a part is used for, or None."""
    reshape = _only_user(part, "Reshape")
    transpose = _only_user(reshape.outputs[0], "Transpose") if reshape is not None else None
    if reshape is None or transpose is None:
        return None
    perm = transpose.attributes["perm"].as_ints()
    keeps_positions = (
        part.shape is not None
        and (rows := reshape.outputs[0].shape) is not None
        and len(rows) == 4
        and rows[:2] == part.shape[:2]
    )
    return transpose if keeps_positions and tuple(perm) == _HEADS_FIRST else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    if value.is_graph_output():
        return None
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None
