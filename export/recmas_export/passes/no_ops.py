"""What tracing leaves behind: factors of one, slices of everything, shapes that are known."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.passes import Sequential
from onnx_ir.tape import Tape
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    add_0_rule,
    collapse_slice2_rule,
    collapse_slice_rule,
    mul_by_1_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

_RULES = RewriteRuleSet(
    [
        add_0_rule,
        mul_by_1_rule,
        collapse_slice_rule,
        collapse_slice2_rule,
        no_op_transpose_rule,
        transpose_transpose_rule,
        unsqueeze_unsqueeze_rule,
    ]
)


def drop_no_ops(model: ir.Model) -> None:
    """Remove operators that return what they are given, and make shapes constant, in place."""
    _RULES.apply_to_model(model)
    Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _fix_shape(model.graph, node)


def _fix_shape(graph: ir.Graph, node: ir.Node) -> None:
    """Let a Reshape copy the leading dimensions that it keeps, rather than be told them.

    A shape that is put together at run time costs operators on the host, on every call.
    """
    source, target = node.inputs
    before, after = source.shape if source is not None else None, node.outputs[0].shape
    if target is None or target.const_value is not None or before is None or after is None:
        return
    kept = 0
    while kept < min(len(before), len(after)) and _is_same(before[kept], after[kept]):
        kept += 1
    rest = [dim if isinstance(dim, int) else -1 for dim in after[kept:]]
    if rest.count(-1) > 1:
        return
    tape = Tape()
    sizes = [0] * kept + rest
    name = "shape." + ".".join(str(size) for size in sizes)
    shape = graph.initializers.get(name) or tape.initializer(ir.tensor(sizes, name=name))
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    node.replace_input_with(1, shape)
    node.attributes.pop("allowzero", None)  # 0 is to copy a dimension, which is the default


def _is_same(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    return left == right and (isinstance(left, int) or left.value is not None)
