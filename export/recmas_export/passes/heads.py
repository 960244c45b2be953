"""Packed queries, keys and values become heads in one transpose, and are split after it.

Shape legend: B samples, S positions, D head width.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from recmas_export.passes.splice import insert, integers, take_over

_HEADS_FIRST = (0, 2, 1, 3)


def split_after_heads(graph: ir.Graph) -> None:
    """Move a split behind the transposes of its parts, which so become one, in place.

    Split, then for each part Reshape to [B, S, heads, D] and Transpose to [B, heads, S, D], is
    Reshape, Transpose and a split of heads.
    """
    for node in list(graph):
        if node.op_type == "Slice":
            _use_split(graph, node)
    for node in list(graph):
        if node.op_type == "Split":
            _move_split(graph, node)


def _use_split(graph: ir.Graph, node: ir.Node) -> None:
    """Write slices that cut a value into all of its parts as one split."""
    source = node.inputs[0]
    if source is None or source.shape is None:
        return
    slices = [user for user, place in source.uses() if user.op_type == "Slice" and place == 0]
    if slices[0] is not node or len(slices) != len(source.uses()):
        return
    axis, width = len(source.shape) - 1, source.shape[-1]
    cuts = sorted(cut for s in slices if (cut := _cut(s, axis, width)) is not None)
    starts, ends = [start for start, _ in cuts], [end for _, end in cuts]
    if len(cuts) != len(slices) or len(cuts) < 2 or starts != [0, *ends[:-1]] or ends[-1] != width:
        return
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


def _cut(node: ir.Node, axis: int, width: int | ir.SymbolicDim) -> tuple[int, int] | None:
    """Return where a slice of the given axis starts and ends; None if it is another slice."""
    numbers = [integers(value) for value in node.inputs[1:]]
    match numbers:
        case [[int(start)], [int(end)], [int(along)], [1]] if along % (axis + 1) == axis:
            return (start, min(end, width)) if isinstance(width, int) and start >= 0 else None
    return None


def _move_split(graph: ir.Graph, node: ir.Node) -> None:
    packed, sizes = node.inputs[0], integers(node.inputs[1]) if len(node.inputs) > 1 else None
    transposes = [_heads_of(part) for part in node.outputs]
    if packed is None or packed.shape is None or sizes is None or None in transposes:
        return
    heads = [t.outputs[0] for t in transposes if t is not None]
    widths = {value.shape[3] for value in heads if value.shape is not None}
    if len(packed.shape) != 3 or len(widths) != 1 or not isinstance(width := widths.pop(), int):
        return
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
