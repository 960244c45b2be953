"""Operators that do not run where they should are found by running a step."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from recmas_runtime.checking.placement import _judge, find_stray_nodes, refuse_stray_nodes
from recmas_runtime.core.errors import RecmasError


def write_graph(folder: Path, kind: str, nodes: str) -> Path:
    head = '<ir_version: 10, opset_import: ["": 24]>'
    text = f"{head} g ({kind}[batch,positions,capacity] x) => ({kind}[b,p,c] y) {{{nodes}}}"
    onnx.save(onnx.parser.parse_model(text), folder / "graph.onnx")
    return folder / "graph.onnx"


def test_a_graph_with_kernels_for_all(tmp_path: Path) -> None:
    nodes = "a = Exp (x) s = Shape (a) r = Reshape (a, s) y = Softplus (r)"
    assert find_stray_nodes(write_graph(tmp_path, "float", nodes)) == ()


def test_an_operator_without_a_kernel_of_its_type(tmp_path: Path) -> None:
    """The CPU computes this softplus in float32: ONNX Runtime casts before and after, silently."""
    found = find_stray_nodes(write_graph(tmp_path, "float16", "y = Softplus (x)"))
    assert [node.op_type for node in found] == ["Cast", "Cast"]
    assert "without a kernel of its type" in str(found[0])
    with pytest.raises(RecmasError, match=r"RM304.*2 operators of a step do not run on CPU"):
        refuse_stray_nodes(tmp_path / "graph.onnx")


@pytest.mark.parametrize(
    ("op_type", "provider", "output", "reason"),
    [
        ("Add", "CUDAExecutionProvider", {"float": [1, 8]}, None),
        ("Add", "CPUExecutionProvider", {"float": [1]}, "runs on CPUExecutionProvider"),
        ("Concat", "CPUExecutionProvider", {"int64": [4]}, None),
        ("Range", "CPUExecutionProvider", {"int64": [512]}, "runs on CPUExecutionProvider"),
        ("MemcpyToHost", "CUDAExecutionProvider", {"int64": [1]}, "copies between devices"),
    ],
)
def test_what_counts_on_a_device(
    op_type: str, provider: str, output: dict[str, list[int]], reason: str | None
) -> None:
    """The form of a profile's entries is that of the runs above; no CUDA is needed to judge it."""
    arguments = {"op_name": op_type, "provider": provider, "output_type_shape": [output]}
    found = _judge({"name": "node_1_kernel_time", "args": arguments}, "CUDAExecutionProvider")
    assert (found and found.reason) == reason
