"""Graphs in the form for TensorRT: covered by its parser's documentation, and computing the same.

The documentation's list is data in `tests/tensorrt_engines/parser_documentation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from kit.engines import CASES, Exported, random_ids, relative
from kit.parser_documentation import OPSETS, element_types, refused_nodes
from recmas_export.backbone_graph import DECODER, EMBED, HEAD
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.tensorrt.static_graph import input_shapes, read_graph, static_decoder
from recmas_runtime.formats.precisions import TOLERANCES

CAPACITY = 64

Get = Callable[[str], Exported]


def with_all_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Infer types that the graph does not state, and make sure that none is unknown."""
    inferred = onnx.shape_inference.infer_shapes(model)
    types = element_types(inferred)
    first = [node.input[0] for node in inferred.graph.node if node.input]
    assert [name for name in first if name and name not in types] == []
    return inferred


def written_for_tensorrt(folder: Path, capacity: int = CAPACITY) -> onnx.ModelProto:
    return static_decoder(read_graph(folder / DECODER), capacity, file=DECODER)


@pytest.mark.parametrize("name", CASES)
def test_the_parser_reads_every_family(exported: Get, name: str) -> None:
    folder = exported(name).folder
    for model in (
        written_for_tensorrt(folder),
        read_graph(folder / EMBED),
        read_graph(folder / HEAD),
    ):
        assert refused_nodes(with_all_types(model)) == []
        (opset,) = [each.version for each in model.opset_import if each.domain == ""]
        assert opset in OPSETS


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_adapted_graph_computes_the_same(exported: Get, name: str) -> None:
    case = exported(name)
    model = written_for_tensorrt(case.folder)
    for node in model.graph.node:
        if node.op_type == "Attention":
            # ONNX Runtime refuses what only TensorRT's parser knows.
            node.attribute.remove(next(a for a in node.attribute if a.name == "TRT_decomposable"))
    path = case.folder / "adapted.onnx"
    onnx.save(model, str(path))
    original = case.decoder
    embeds = case.embed(random_ids(case.backbone, 2, 9))
    expected = case.call(case.new_cache(2, capacity=CAPACITY), embeds, write_index=[0, 5])
    case.decoder = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    try:
        found = case.call(case.new_cache(2, capacity=CAPACITY), embeds, write_index=[0, 5])
    finally:
        case.decoder = original
    assert found.keys() == expected.keys()
    for output, values in expected.items():
        assert relative(found[output], values) <= TOLERANCES["hidden_relative"] / 10, output


def test_the_capacity_is_fixed_and_nothing_else(exported: Get) -> None:
    folder = exported("llama").folder
    before = input_shapes(read_graph(folder / DECODER))
    model = written_for_tensorrt(folder, 192)
    after = input_shapes(model)
    assert {dim for dims in before.values() for dim in dims if isinstance(dim, str)} == {
        "batch",
        "capacity",
        "groups",
        "link_hidden",
        "positions",
    }
    for name, dims in before.items():
        assert after[name] == tuple(192 if dim == "capacity" else dim for dim in dims)
    # Every cache is a network input, and what is written a network output: TensorRT's condition
    # for writing in place.
    outputs = {value.name for value in model.graph.output}
    writes = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "TensorScatter"
    }
    caches = [name for name in after if name.startswith(("key.", "value."))]
    assert writes == {f"present_{name}": name for name in caches}
    assert writes.keys() <= outputs


def test_queries_are_scaled_and_keys_are_not(exported: Get) -> None:
    model = written_for_tensorrt(exported("llama").folder)
    constants = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in model.graph.initializer
        if not t.external_data
    }
    producers = {output: node for node in model.graph.node for output in node.output}
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert attentions
    for node in attentions:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"scale": 1.0, "TRT_decomposable": 1}
        assert producers[node.input[1]].op_type == "TensorScatter"
        scaled = producers[node.input[0]]
        assert scaled.op_type == "Mul"
        np.testing.assert_allclose(constants[scaled.input[1]], 16**-0.5)


@pytest.mark.parametrize(
    "inputs",
    [
        ("q", "k", "v"),
        ("q", "k", "v", ""),
        ("q", "k", "v", "mask", "past_key", "past_value"),
        ("q", "k", "v", "mask", "", "", "lengths"),
    ],
)
def test_attention_that_an_engine_would_compute_wrongly(inputs: tuple[str, ...]) -> None:
    node = helper.make_node("Attention", inputs, ["y"], name="layer.0", scale=1.0)
    keys = helper.make_tensor_value_info("k", TensorProto.FLOAT, [1, 1, 1, 1])
    model = helper.make_model(helper.make_graph([node], "graph", [], [keys]))
    with pytest.raises(RecmasError, match=r"RM203.*operator Attention \(layer.0\)") as refused:
        static_decoder(model, CAPACITY, file="decoder.onnx")
    assert refused.value.problems[0].file == "decoder.onnx"
