"""What graphs read besides themselves: found wherever it is, and only within a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from kit.hand_bundle import rehash
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.onnx_file import ExternalData, external_data

EMBED = "backbones/one/embed.onnx"


def outside(location: str, offset: int = 0, length: int | None = 8) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[2], raw_data=b"\0" * 8)
    set_external_data(tensor, location, offset, length)
    tensor.ClearField("raw_data")
    return tensor


def test_tensors_are_found_wherever_graphs_hold_them(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [], [outside("branch")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=outside("attribute", 4)),
        helper.make_node("If", ["c"], ["x"], then_branch=branch, else_branch=branch),
    ]
    sparse = onnx.SparseTensorProto(values=outside("values"), indices=outside("indices"))
    graph = helper.make_graph(
        nodes, "g", [], [], [outside("weights", 16, 32)], sparse_initializer=[sparse]
    )
    function = helper.make_function(
        "d", "F", [], ["y"], [helper.make_node("Constant", [], ["y"], value=outside("function"))],
        [helper.make_opsetid("", 24)],
    )  # fmt: skip
    model = helper.make_model(graph, functions=[function])
    onnx.save(model, tmp_path / "m.onnx")
    found = external_data(tmp_path / "m.onnx", file="m.onnx")
    assert found == {
        ExternalData("branch", 0, 8),
        ExternalData("attribute", 4, 8),
        ExternalData("values", 0, 8),
        ExternalData("indices", 0, 8),
        ExternalData("weights", 16, 32),
        ExternalData("function", 0, 8),
    }


@pytest.mark.parametrize(
    ("location", "offset", "length", "code", "words"),
    [
        ("../../../etc/passwd", 0, 8, "RM402", "not inside the bundle"),
        ("/etc/passwd", 0, 8, "RM402", "not inside the bundle"),
        ("a/../../x", 0, 8, "RM402", "not inside the bundle"),
        ("", 0, 8, "RM402", "not inside the bundle"),
        ("nothing.bin", 0, 8, "RM401", "which the manifest does not list"),
        ("weights.safetensors", 0, 2**40, "RM404", "the graph reads bytes 0 to"),
        ("weights.safetensors", 2**40, 8, "RM404", "the graph reads bytes"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_graphs_read_nothing_else_than_listed_files(
    own_bundle: Path, location: str, offset: int, length: int, code: str, words: str, nested: bool
) -> None:
    model = onnx.load(own_bundle / EMBED)
    tensor = outside(location, offset, length)
    if nested:
        model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
    else:
        model.graph.initializer.append(tensor)
    (own_bundle / EMBED).write_bytes(model.SerializeToString())
    rehash(own_bundle)
    with pytest.raises(RecmasError) as caught:
        open_bundle(own_bundle)
    (problem,) = caught.value.problems
    assert (problem.code, problem.file) == (code, EMBED)
    assert words in problem.message


def test_every_cut_of_a_graph_is_read_to_an_end(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor, outside("x")]))
    raw = model.SerializeToString()
    path = tmp_path / "m.onnx"
    refused = 0
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        try:
            external_data(path, file="m.onnx")
        except RecmasError as error:
            refused += error.problems[0].code == "RM507"
    assert refused > len(raw) // 2
