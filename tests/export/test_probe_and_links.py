"""The link graph against the torch modules, and the known-answer probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch

from kit.engines import random_link, relative, session
from recmas_export.written_graphs import write_link_graph, write_probe
from recmas_runtime.engines.onnx.probe import measure_probe
from recmas_runtime.formats.link_kinds import LinkKind
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import TOLERANCES

KINDS = get_args(LinkKind)


@pytest.fixture(scope="module")
def link_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("link") / "link.onnx"
    write_link_graph(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("role", "in_dim", "out_dim"), [("inner", 48, 48), ("outer", 48, 80), ("outer", 80, 48)]
)
def test_every_form_equals_its_module(
    link_graph: Path, tmp_path: Path, kind: str, role: str, in_dim: int, out_dim: int
) -> None:
    module, operands = random_link(tmp_path, kind, role, in_dim, out_dim)
    x = np.random.default_rng(0).normal(size=(1, 7, in_dim)).astype(np.float32) * 30
    (y,) = session(link_graph).run(["y"], {"x": x, **stack_operands([operands])})
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    assert relative(y, expected) < TOLERANCES["link_relative"]


def test_links_of_all_kinds_in_one_call(link_graph: Path, tmp_path: Path) -> None:
    """Hidden widths differ (ln_residual has twice as much): zeros fill up and change nothing."""
    links = [random_link(tmp_path, kind, "outer", 32, 48, seed=s) for s, kind in enumerate(KINDS)]
    x = np.random.default_rng(1).normal(size=(len(KINDS), 5, 32)).astype(np.float32)
    stacked = stack_operands([operands for _, operands in links])
    (y,) = session(link_graph).run(["y"], {"x": x, **stacked})
    for group, (module, _) in enumerate(links):
        with torch.no_grad():
            expected = module(torch.from_numpy(x[group])).numpy()
        assert relative(y[group], expected) < TOLERANCES["link_relative"]


@pytest.mark.parametrize("write", [write_link_graph, write_probe])
def test_graphs_are_valid_standard_and_deterministic(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    write(first)
    write(second)
    assert first.read_bytes() == second.read_bytes()
    onnx.checker.check_model(str(first), full_check=True)
    model = onnx.load(first)
    assert {node.domain for node in model.graph.node} == {""}


def test_probe_finds_its_answer(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.onnx")
    assert measure_probe(tmp_path / "probe.onnx", threads=1) <= TOLERANCES["probe_absolute"]


def test_probe_is_computed_and_not_folded(tmp_path: Path) -> None:
    """A runtime that folds the inputs at load would probe its own constant folding."""
    write_probe(tmp_path / "probe.onnx")
    probe = session(tmp_path / "probe.onnx")
    assert not probe.get_inputs()
    assert {i.name for i in probe.get_overridable_initializers()} >= {"query", "key", "value"}


# What an engine might get wrong -> how the probe's graph then looks.
MISTAKES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "ignores the mask": lambda m: _drop_input(m, "Attention", 3),
    "writes at one index for all samples": lambda m: _set(m, "write_index", np.array([2, 2])),
    "writes at the end": lambda m: _set(m, "write_index", np.array([6, 6])),
    "forgets the scale": lambda m: _attribute(m, "Attention", "scale", 0.5),
    "takes the wrong head": lambda m: _swap_heads(m, "key", "value", "new_value"),
    "sees one position too few": lambda m: _set(m, "new_positions", np.array([[-1, 0]])),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_probe_notices(tmp_path: Path, mistake: str) -> None:
    write_probe(tmp_path / "probe.onnx")
    model = onnx.load(tmp_path / "probe.onnx")
    MISTAKES[mistake](model)
    onnx.save(model, tmp_path / "wrong.onnx")
    assert not measure_probe(tmp_path / "wrong.onnx", threads=1) <= 1e-3


def _drop_input(model: onnx.ModelProto, kind: str, index: int) -> None:
    for node in model.graph.node:
        if node.op_type == kind:
            del node.input[index]


def _attribute(model: onnx.ModelProto, kind: str, name: str, value: float) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == kind and attribute.name == name:
                attribute.f = value


def _set(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for initializer in model.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.int64), name))


def _swap_heads(model: onnx.ModelProto, *names: str) -> None:
    for initializer in model.graph.initializer:
        if initializer.name in names:
            swapped = onnx.numpy_helper.to_array(initializer)[:, ::-1].copy()
            initializer.CopyFrom(onnx.numpy_helper.from_array(swapped, initializer.name))
