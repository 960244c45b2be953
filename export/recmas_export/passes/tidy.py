"""Small graph passes over what the exporter wrote: fold, share, name, strip.

The torch exporter leaves constants unfolded and stack traces of this machine in the metadata. Its
own optimizer would fold too, but takes as long as the export, most of it in rewrites that do not
apply.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
from onnx_ir.passes import Sequential
from onnx_ir.tape import Tape

PRODUCER = "recmas"
# The first opset with TensorScatter.
OPSET = 24
# IR version 10 is what the torch exporter writes; every reader of opset 24 knows it.
IR_VERSION = 10


def tidy(model: ir.Model) -> None:
    """Fold constants, merge equal nodes and drop dead ones, in place."""
    _transpose_weights(model.graph)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=False)
    Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)


def strip(model: ir.Model, *, name: str) -> None:
    """Remove what is not computation, so that equal models give equal bytes.

    Types and shapes within the graph stay: with them ONNX Runtime loads three times as fast.
    """
    common.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = PRODUCER, None
    model.ir_version = IR_VERSION
    model.graph.name = name
    values = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        node.name = None
        values.update(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None


def check_operators(model: ir.Model) -> None:
    """Assert that only standard ONNX operators are used."""
    foreign = sorted({n.domain for n in model.graph.all_nodes() if n.domain not in ("", "ai.onnx")})
    assert not foreign, f"operators of {foreign} in {model.graph.name}"
    assert not model.functions, f"functions {list(model.functions)} in {model.graph.name}"


def _is_matrix_transpose(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and (perm is None or tuple(perm.as_ints()) == (1, 0))


def _transpose_weights(graph: ir.Graph) -> None:
    """Store a weight the way it is multiplied: Transpose(W) becomes an initializer of its own.

    Runtimes would fold the transpose at load, into a copy in memory that no page cache shares.
    """
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or not _is_matrix_transpose(node) or source.const_value is None:
            continue
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
        graph.remove(node, safe=True)


def multiply_as_stored(graph: ir.Graph) -> None:
    """Make each MatMul(x [B,1,d], Transpose(W)) a Gemm on W [V,d] as it is, in place.

    The embedding table and a tied head can so be the same bytes, and no runtime makes a transposed
    copy of the largest weight there is.
    """
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        activation, transposed = node.inputs
        assert activation is not None
        assert transposed is not None
        transpose = transposed.producer()
        if transpose is None or not _is_matrix_transpose(transpose):
            continue
        weight = transpose.inputs[0]
        if weight is None or weight.const_value is None:
            continue
        vocabulary, width = weight.const_value.shape.numpy()
        tape = Tape()
        flat = _int_vector(tape, [-1, width], name=f"{weight.name}.rows")
        unflat = _int_vector(tape, [-1, 1, vocabulary], name=f"{weight.name}.logits")
        product = tape.op("Gemm", (tape.op("Reshape", (activation, flat)), weight), {"transB": 1})
        result = tape.op("Reshape", (product, unflat))
        for initializer in tape.initializers:
            graph.register_initializer(initializer)
        graph.insert_before(node, tape.nodes)
        node.outputs[0].replace_all_uses_with(result)
        graph.remove(node, safe=True)


def _int_vector(tape: Tape, values: list[int], *, name: str) -> ir.Value:
    return tape.initializer(ir.tensor(values, dtype=ir.DataType.INT64, name=name))
