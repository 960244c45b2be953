"""Buffers that are numpy arrays, bound to a real graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from recmas_runtime.engines.onnx.caches import DeviceArray, Memory
from recmas_runtime.engines.onnx.session import make_session

HOST = Memory("cpu", shared=True)


def doubling(folder: Path) -> Path:
    """Write a graph that doubles two numbers."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    opset = helper.make_opsetid("", 24)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), folder / "g.onnx")
    return folder / "g.onnx"


def read_only() -> DeviceArray:
    """Return a buffer over an array as an object store or a mapped file has it."""
    array = np.ones(2, np.float32)
    array.flags.writeable = False
    return HOST.hold(array)


def test_graphs_read_arrays_that_are_not_writeable(tmp_path: Path) -> None:
    session = make_session(doubling(tmp_path), threads=1)
    binding, given, result = session.io_binding(), read_only(), HOST.zeros((2,))
    given.bind_input(binding, "x")
    result.bind_output(binding, "y")
    session.run_with_iobinding(binding)
    assert (result.numpy().tolist(), given.numpy().tolist()) == ([2, 2], [1, 1])


def test_no_graph_writes_into_an_array_that_is_not_writeable(tmp_path: Path) -> None:
    session = make_session(doubling(tmp_path), threads=1)
    shared = read_only()
    with pytest.raises(AssertionError, match="output 'y' is bound to an array that is not"):
        shared.bind_output(session.io_binding(), "y")
    for change in (lambda: shared.write(2), lambda: shared.copy(HOST.zeros((2,)))):
        with pytest.raises(ValueError, match="read-only"):
            change()
    assert shared.clone().numpy().flags.writeable
    assert shared.numpy().tolist() == [1, 1]
