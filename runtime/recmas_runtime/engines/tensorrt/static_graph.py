"""A decoder graph in the form that TensorRT takes: one capacity, and what its parser insists on.

The graph is edited as a protobuf; its weights stay in the bundle's file and are read from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from recmas_runtime.core.errors import fail
from recmas_runtime.engines.tensorrt.parser_support import element_types, unsupported

if TYPE_CHECKING:
    import onnx

    from recmas_runtime.engines.tensorrt.profiles import Symbols

CAPACITY: Final = "capacity"

_PROTOBUF_NAMES: Final = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights.

    Raises:
        RecmasError: RM201 if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise fail(
            "RM201",
            "onnx is not installed; engines are built from ONNX graphs with it",
            hint="Install it with `pip install recmas[tensorrt]`.",
        ) from None
    return onnx.load(str(path), load_external_data=False)


def input_shapes(model: onnx.ModelProto) -> dict[str, Symbols]:
    """Return the shape of every input; free axes are names."""
    return {
        value.name: tuple(
            dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """Make the caches' capacity a constant of the graph, in place.

    TensorRT writes a cache in place only if its rows are a static axis (KVCacheUpdate: S_max).
    """
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == CAPACITY:
                dim.dim_value = capacity  # dim_param and dim_value are one field: this clears it


def adapt_cache_writes(model: onnx.ModelProto) -> None:
    """Count the axis of every cache write from the end, in place: the parser takes -2 only."""
    for node in model.graph.node:
        if node.op_type == "TensorScatter":
            for attribute in node.attribute:
                if attribute.name == "axis" and attribute.i == 2:
                    attribute.i = -2


def adapt_attention(model: onnx.ModelProto) -> None:
    """Scale queries before attention instead of within it, and let it fall apart, in place.

    The parser turns an attribute `scale` into multiplications of queries *and* keys by its root,
    and the keys here are the whole cache: every step would read and write all of it once more. With
    a scale of 1 that factor is a constant 1.

    Without `TRT_decomposable`, an attribute of the parser's own, a build fails where TensorRT has
    no fused kernel for a shape or an element type; float32 has none.
    """
    from onnx import TensorProto, helper

    types = element_types(model)
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Attention":
            scale = next((a for a in node.attribute if a.name == "scale"), None)
            assert scale is not None, "the exporter writes every scale out"
            # In a strongly typed network a factor must have the element type of what it scales; the
            # keys' type is known, because updated caches are outputs of the graph.
            element_type = TensorProto.DataType.Value(_PROTOBUF_NAMES[types[node.input[1]]])
            factor = f"{node.output[0]}.scale"
            scaled = f"{node.output[0]}.scaled_query"
            model.graph.initializer.append(helper.make_tensor(factor, element_type, (), [scale.f]))
            nodes.append(helper.make_node("Mul", [node.input[0], factor], [scaled]))
            node.input[0] = scaled
            scale.f = 1.0
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def check_readable(model: onnx.ModelProto, *, file: str) -> None:
    """Make sure that the parser's documentation covers a graph.

    Raises:
        RecmasError: RM203 that names what it does not cover.
    """
    reasons = unsupported(model)
    if reasons:
        raise fail(
            "RM203",
            f"TensorRT's parser does not read {', '.join(reasons)}",
            file=file,
            hint="Use target onnx, or a backbone with plain softmax attention.",
        )


def static_decoder(model: onnx.ModelProto, capacity: int, *, file: str) -> onnx.ModelProto:
    """Return a copy of a decoder graph for one cache capacity.

    Raises:
        RecmasError: RM203 where TensorRT's parser does not read it.
    """
    import onnx

    static = onnx.ModelProto()
    static.CopyFrom(model)
    fix_capacity(static, capacity)
    adapt_cache_writes(static)
    adapt_attention(static)
    check_readable(static, file=file)
    return static


def cache_pairs(inputs: Mapping[str, Symbols]) -> dict[str, str]:
    """Return the cache inputs by the output that must be the same memory."""
    kinds = ("key.", "value.")
    return {f"present_{name}": name for name in inputs if name.startswith(kinds)}
