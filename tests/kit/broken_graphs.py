"""Decoders that write the rows of their caches in a wrong place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def change_graph(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change the graph in a file; its weights stay where they are."""
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)


def behind_kept_rows(graph: onnx.GraphProto) -> None:
    """Make calls of several positions write at the beginning, wherever they are."""
    one = numpy_helper.from_array(np.array([1]), "one_position")
    graph.initializer.append(one)
    made = [
        helper.make_node("Shape", ["inputs_embeds"], ["length"], start=1, end=2),
        helper.make_node("Equal", ["length", one.name], ["is_step"]),
        helper.make_node("Cast", ["is_step"], ["factor"], to=TensorProto.INT64),
        helper.make_node("Mul", ["write_index", "factor"], ["write_at"]),
    ]
    for write in writes_of(graph):
        write.input[2] = "write_at"
    for node in reversed(made):
        graph.node.insert(0, node)


def over_other_rows(graph: onnx.GraphProto) -> None:
    """Make writes reach only rows that nothing was written to: what is there stays."""
    zero = numpy_helper.from_array(np.array(0, np.float32), "nothing")
    graph.initializer.append(zero)
    for write in writes_of(graph):
        cache, written = write.input[0], write.output[0]
        write.output[0] = f"{written}.all"
        place = list(graph.node).index(write) + 1
        made = [
            helper.make_node("Equal", [cache, zero.name], [f"{written}.free"]),
            helper.make_node("Where", [f"{written}.free", f"{written}.all", cache], [written]),
        ]
        for node in reversed(made):
            graph.node.insert(place, node)


def writes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes that write rows of a cache."""
    found = [node for node in graph.node if node.op_type == "TensorScatter"]
    assert found
    return found
