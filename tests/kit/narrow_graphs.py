"""What types the values of a graph have: inferred by ONNX, beside those that the graph states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

FLOATS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
# By operator, the operands that its type is told by.
PRODUCTS = {"Attention": 0, "Gemm": 0, "MatMul": 0, "MatMulNBits": 0, "RotaryEmbedding": 0}
NORMS = ("RMSNormalization", "LayerNormalization", "Softmax", "Cos", "Sin", "ReduceMean")


def checked(path: Path) -> onnx.ModelProto:
    """Return a graph whose types ONNX has checked and inferred anew, value by value.

    Operators of ONNX Runtime alone are left out of the check; their results keep stated types.
    """
    model = onnx.load(str(path))
    own = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
    if not own:
        onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=not own, data_prop=True
    )


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the type of every value that is a real number."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    found |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: FLOATS[kind] for name, kind in found.items() if kind in FLOATS}


def computed_in(model: onnx.ModelProto) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield every operator with the types of its real operands and results."""
    types = types_of(model)
    for node in model.graph.node:
        names = (*node.input, *node.output)
        yield node.op_type, frozenset(types[name] for name in names if name in types)
