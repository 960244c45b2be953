"""Rewrites of a traced decoder: the same numbers from fewer, larger operators.

Each is general: it looks at operators and constants, never at names or architectures. Where its
form is not found, the graph stays as it was traced.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.passes import Sequential

from recmas_export.passes.heads import split_after_heads
from recmas_export.passes.no_ops import drop_no_ops
from recmas_export.passes.operators import use_standard_operators
from recmas_export.passes.products import pack_products


def clean(model: ir.Model) -> None:
    """Rewrite a tidied graph in place: whole operators, packed products, one transpose per layer.

    Packed weights are plain initializers [in, out]; the ones they are made of leave the graph.
    """
    drop_no_ops(model)
    use_standard_operators(model)
    pack_products(model.graph)
    split_after_heads(model.graph)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
