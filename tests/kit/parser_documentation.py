"""What TensorRT's ONNX parser reads, as its documentation lists it.

Source: `docs/operators.md` of onnx/onnx-tensorrt as of TensorRT 10.15 (opsets 9 to 24), the oldest
version in use here; later versions only add to it. Names and element types are facts of that table;
the rules below are those of its restrictions that concern operators of decoder graphs, and of the
parser's source where the table says less than what it does. A build asks the parser itself; this
is for machines without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import onnx

OPSETS: Final = range(9, 25)

_REAL: Final = frozenset({"float32", "float16", "bfloat16"})
_NUMBER: Final = _REAL | {"int32", "int64"}
_ANY: Final = _NUMBER | {"bool"}
_BOOL: Final = frozenset({"bool"})


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# element types of the first input -> operators
_TABLE: Final[tuple[tuple[frozenset[str], frozenset[str]], ...]] = (
    (
        _REAL,
        _names(
            """Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv
            ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool
            GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish Hardmax
            ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN
            LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus
            PRelu QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike
            Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round ScaledTanh Scan Selu
            Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"""
        ),
    ),
    (
        _NUMBER,
        _names(
            """Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less
            LessOrEqual Max Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum
            ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
            Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"""
        ),
    ),
    (
        _ANY,
        _names(
            """Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot
            Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze
            Where"""
        ),
    ),
    (_BOOL, _names("And Not Or Xor")),
    (_ANY | {"uint8"}, _names("Cast CastLike")),
    (_ANY | {"float8", "float4", "int4"}, _names("Constant ConstantOfShape")),
    (_REAL | {"int8", "float8"}, _names("Attention")),
    (_NUMBER | {"float8"}, _names("Mean")),
    (_NUMBER | {"int8"}, _names("Gelu")),
    (_REAL | {"int32"}, _names("TensorScatter")),
    (frozenset({"int8", "float8", "float4", "int4"}), _names("DequantizeLinear")),
    (frozenset({"float32"}), _names("STFT")),
    (
        frozenset({"float32", "float16"}),
        _names(
            """BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression
            NonZero RoiAlign"""
        ),
    ),
)

SUPPORTED: Final = {name: types for types, names in _TABLE for name in names}

# `axes` must be known when the graph is read.
_CONSTANT_AXES: Final = frozenset(
    {"Squeeze", "Unsqueeze"} | {name for name in SUPPORTED if name.startswith("Reduce")}
)

_ELEMENT_TYPES: Final = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "float8",
    22: "int4",
    23: "float4",
}


def refused_nodes(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, str]]:
    """Return the nodes that the parser refuses, with the reason; empty if it reads the graph.

    Element types are checked where the graph states them.
    """
    types = element_types(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    return [
        (node, reason)
        for node in model.graph.node
        for reason in _node_reasons(node, types, constants)
    ]


def element_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the element types of values by name, as far as the graph states them."""
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return {name: _ELEMENT_TYPES.get(code, f"type {code}") for name, code in types.items() if code}


def _node_reasons(
    node: onnx.NodeProto, types: dict[str, str], constants: set[str]
) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
        yield "no importer and no plugin of this name"
        return
    first = types.get(node.input[0]) if node.input else None
    if first is not None and first not in SUPPORTED[node.op_type]:
        yield f"{first} is not supported"
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type in _CONSTANT_AXES and len(node.input) > 1 and node.input[1] not in constants:
        yield "axes must be an initializer"
    if node.op_type == "RotaryEmbedding" and types.get((*node.input, "", "", "", "")[3]) == "int32":
        yield "int32 positions are not supported"
    if node.op_type == "TensorScatter":
        if "axis" not in attributes or attributes["axis"].i != -2:
            yield "axis must be -2"
        if "mode" in attributes and attributes["mode"].s != b"linear":
            yield "circular mode is not supported"
    if node.op_type == "Attention":
        if len(node.output) > 1:
            yield "only one output is supported"
        if "q_num_heads" in attributes:
            yield "three-dimensional inputs are not supported"
        if "softcap" in attributes and attributes["softcap"].f != 0:
            yield "softcap is not supported"
