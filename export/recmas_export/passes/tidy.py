"""What tracing leaves behind, and the form that every graph is written in.

The torch exporter leaves constants unfolded, shapes put together at run time, and stack traces of
this machine in the metadata. Its own optimizer would fold too, but takes as long as the export,
most of it in rewrites that do not apply.
"""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.tape import Tape
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.rules.common import (
    collapse_slice2_rule,
    collapse_slice_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    unsqueeze_unsqueeze_rule,
)

PRODUCER = "recmas"
# The first opset with TensorScatter.
OPSET = 24
# The domain of nodes that are traced for a pass to write in operators.
TRACED = "recmas"
# The domain of operators that only ONNX Runtime has.
MICROSOFT = "com.microsoft"
# IR version 10 is what the torch exporter writes; every reader of opset 24 knows it.
IR_VERSION = 10


def constant(tape: Tape, value: float | list[int], name: str) -> ir.Value:
    """Return a new constant of the graph: a float32 scalar or an int64 vector."""
    dtype = ir.DataType.FLOAT if isinstance(value, float) else ir.DataType.INT64
    return tape.initializer(ir.tensor(value, dtype=dtype, name=name))


def free_name(graph: ir.Graph, name: str) -> str:
    """Return a name that no initializer of the graph has: this one, or it with a number behind."""
    others = (f"{name}.{number}" for number in count(2))
    return next(free for free in chain([name], others) if free not in graph.initializers)


def insert(graph: ir.Graph, tape: Tape, *, before: ir.Node) -> None:
    """Put the nodes and initializers of a tape into the graph."""
    for initializer in tape.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(before, tape.nodes)


def take_over(new: ir.Value, old: ir.Value) -> None:
    """Let `new` be what `old` was: for its users, as an output, in shape and type."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def integers(value: ir.Value | None) -> list[int] | None:
    """Return a constant vector of integers; None if it is no constant."""
    tensor = value.const_value if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


class MultiplyAsStored(InPlacePass):
    """Multiply by a head's weight [V, d] as it is stored.

    1. MatMul(x, Transpose(W)) becomes a Gemm with `transB` between two Reshapes.

    The embedding table and a tied head can so be the same bytes, and no runtime makes a transposed
    copy of the largest weight there is.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        products = [node for node in model.graph if node.op_type == "MatMul"]
        changed = [self._rewrite(model.graph, node) for node in products]
        return PassResult(model, any(changed))

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        activation, factor = node.inputs
        assert activation is not None
        assert factor is not None
        transpose = factor.producer()
        weight = _transposed_weight(transpose) if transpose is not None else None
        if weight is None or weight.const_value is None:
            return False
        vocabulary, width = weight.const_value.shape.numpy()
        tape = Tape()
        flat = constant(tape, [-1, width], f"{weight.name}.rows")
        unflat = constant(tape, [-1, 1, vocabulary], f"{weight.name}.logits")
        product = tape.op("Gemm", (tape.op("Reshape", (activation, flat)), weight), {"transB": 1})
        result = tape.op("Reshape", (product, unflat))
        insert(graph, tape, before=node)
        node.outputs[0].replace_all_uses_with(result)
        graph.remove(node, safe=True)
        return True


class StoreTransposed(InPlacePass):
    """Store a weight the way it is multiplied.

    1. Transpose(W) of a constant matrix becomes an initializer of its own.

    Runtimes would fold the transpose at load, into a copy in memory that no page cache shares.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place; nodes and weights that are then unused stay."""
        changed = [self._store(model.graph, node) for node in model.graph]
        return PassResult(model, any(changed))

    def _store(self, graph: ir.Graph, node: ir.Node) -> bool:
        source = _transposed_weight(node)
        if source is None or source.const_value is None:
            return False
        stored = ir.Tensor(source.const_value.numpy().T, name=f"{source.name}.transposed")
        assert not stored.shape.is_dynamic(), "weights have sizes"
        value = ir.Value(
            name=stored.name,
            type=ir.TensorType(stored.dtype),
            shape=stored.shape,
            const_value=stored,
        )
        if stored.name not in graph.initializers:
            graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(graph.initializers[value.name or ""])
        return True


class FoldConstants(InPlacePass):
    """Compute what depends on constants only.

    1. Nodes with small constant inputs become Constants; weights stay as they are.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold in place."""
        result = onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
        return PassResult(model, bool(result.modified))


class NoOp(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript is untyped
    """An operator with a number that makes it return what it is given.

    onnxscript's own rules compare with a tolerance: they take an epsilon of 1e-8 for zero, and the
    norm of a padded position, which is all zeros, is then not a number.
    """

    def __init__(self, operator: str, number: int) -> None:
        super().__init__()
        self._operator, self._number = operator, number

    def pattern(self, op: Any, x: Any, number: Any) -> Any:
        """Return the operator on anything and a number."""
        return getattr(op, self._operator)(x, number)

    def check(self, _context: Any, number: ir.Value, **_others: Any) -> MatchResult:
        """Take only a scalar that is exactly the number."""
        result, tensor = MatchResult(), number.const_value
        if tensor is None or tensor.shape.rank() != 0 or tensor.numpy().item() != self._number:
            return result.fail(f"it is not {self._number}")
        return result

    def rewrite(self, op: Any, x: ir.Value, **_others: Any) -> Any:
        """Return what is given."""
        return op.Identity(x)


class DropNoOps(InPlacePass):
    """Remove operators that return what they are given.

    1. x + 0, x * 1, a Transpose to the same order, a Slice of everything.
    2. Two Transposes or two Unsqueezes in a row are one.
    """

    _RULES = RewriteRuleSet(
        [
            NoOp.rule("Add", 0),
            NoOp.rule("Mul", 1),
            collapse_slice_rule,
            collapse_slice2_rule,
            no_op_transpose_rule,
            transpose_transpose_rule,
            unsqueeze_unsqueeze_rule,
        ]
    )

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place; removed nodes leave Identities and Constants."""
        return PassResult(model, bool(self._RULES.apply_to_model(model)))


class FixShapes(InPlacePass):
    """Let a Reshape copy the leading sizes that it keeps, rather than be given them.

    1. A shape that is computed becomes a constant: 0 for the sizes that are the same before and
       after, then numbers, one of which may be free (-1).
    2. Where more than one of the others is free, the shape stays as it is.

    A shape that is put together at run time costs operators on the host, on every call.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite in place."""
        reshapes = [node for node in model.graph if node.op_type == "Reshape"]
        changed = [self._fix(model.graph, node) for node in reshapes]
        return PassResult(model, any(changed))

    def _fix(self, graph: ir.Graph, node: ir.Node) -> bool:
        source, target = node.inputs
        before, after = source.shape if source is not None else None, node.outputs[0].shape
        if target is None or target.const_value is not None or before is None or after is None:
            return False
        kept = 0
        while kept < min(len(before), len(after)) and _is_same(before[kept], after[kept]):
            kept += 1
        rest = [dim if isinstance(dim, int) else -1 for dim in after[kept:]]
        if rest.count(-1) > 1:  # 2
            return False
        tape = Tape()
        sizes = [0] * kept + rest  # 1
        name = "shape." + ".".join(str(size) for size in sizes)
        shape = graph.initializers.get(name) or tape.initializer(ir.tensor(sizes, name=name))
        insert(graph, tape, before=node)
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)  # 0 is to copy a dimension, which is the default
        return True


class Strip(InPlacePass):
    """Remove what is not computation, so that equal models give equal bytes.

    1. Names of nodes, documentation and metadata go; producer and IR version are set.
    2. Types and shapes within the graph stay: with them ONNX Runtime loads three times as fast.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def call(self, model: ir.Model) -> PassResult:
        """Strip in place."""
        common.ClearMetadataAndDocStringPass()(model)
        model.producer_name, model.producer_version = PRODUCER, None
        model.ir_version = IR_VERSION
        model.graph.name = self._name
        values = {*model.graph.inputs, *model.graph.initializers.values()}
        for node in model.graph:
            node.name = None
            values.update(node.outputs)
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
        return PassResult(model, modified=True)


class CheckOperators(InPlacePass):
    """Assert that only standard ONNX operators are used; nothing is rewritten.

    1. Experts are written in such operators later, when their weights are as they are stored.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Return the model as it was."""
        domains = {node.domain for node in model.graph.all_nodes()}
        foreign = sorted(domains - {"", "ai.onnx", TRACED})  # 1
        assert not foreign, f"operators of {foreign} in {model.graph.name}"
        assert not model.functions, f"functions {list(model.functions)} in {model.graph.name}"
        return PassResult(model, modified=False)


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    """Return the constant that a node transposes as a matrix, if it does."""
    perm = node.attributes.get("perm")
    if node.op_type != "Transpose" or (perm is not None and tuple(perm.as_ints()) != (1, 0)):
        return None
    source = node.inputs[0]
    return source if source is not None and source.const_value is not None else None


def _is_same(left: int | ir.SymbolicDim, right: int | ir.SymbolicDim) -> bool:
    return left == right and (isinstance(left, int) or left.value is not None)
