"""Engines that fail while they run, or give results of another shape: told as such, not as bugs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kit.hand_bundle import edit_json, rehash
from recmas_runtime.cli.main import main
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors

CASE = "parity/one.safetensors"


def problem_of(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int
) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == status
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    return dict(problem)


def demand_failure(capsys: pytest.CaptureFixture[str], bundle: Path, *, is_in_case: bool) -> None:
    """A run names the engine's reason; to `verify` it is a bundle that is not right here."""
    reason = "Got invalid dimensions for input"
    problem = problem_of(capsys, "run", bundle, "q", status=1)
    assert problem["code"] == "RM507"
    assert reason in problem["message"]
    assert "\n" not in problem["message"]
    assert "recmas verify" in problem["hint"]
    if is_in_case:
        problem = problem_of(capsys, "verify", bundle, status=5)
        assert (problem["code"], problem["file"]) == ("RM405", CASE)
        assert reason in problem["message"]


@pytest.mark.parametrize("graph", ["backbones/one/embed", "backbones/one/head", "links/link"])
def test_a_graph_that_takes_other_shapes(
    own_bundle: Path, capsys: pytest.CaptureFixture[str], graph: str
) -> None:
    path = own_bundle / f"{graph}.onnx"
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7  # instead of any number
    onnx.save(model, path)
    rehash(own_bundle)
    # The case of this bundle has no vectors of links.
    demand_failure(capsys, own_bundle, is_in_case=graph != "links/link")


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [("head_dim", 2, "key.0"), ("num_kv_heads", 3, "key.0"), ("num_layers", 2, "key.1")],
)
@pytest.mark.parametrize("command", [("run", "q"), ("verify",)])
def test_caches_that_do_not_fit_the_decoder(
    own_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    key: str,
    value: int,
    other: str,
) -> None:
    edit_json(own_bundle / "manifest.json", f"backbones/one/{key}", value)
    name, *more = command
    problem = problem_of(capsys, name, own_bundle, *more, status=5)
    assert (problem["code"], problem["file"]) == ("RM404", "backbones/one/decoder.onnx")
    assert repr(other) in problem["message"]


def test_a_decoder_without_an_input_of_decoders(
    own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_bundle / "backbones/one/decoder.onnx"
    model = onnx.load(path)
    (last_index,) = (i for i in model.graph.input if i.name == "last_index")
    (unsqueeze,) = (n for n in model.graph.node if n.input[0] == "last_index")
    last_index.name = unsqueeze.input[0] = "another_index"
    onnx.save(model, path)
    rehash(own_bundle)
    problem = problem_of(capsys, "run", own_bundle, "q", status=1)
    assert problem["code"] == "RM507"
    assert "last_index" in problem["message"]


def test_a_probe_of_another_shape(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_bundle / "parity/probe.onnx"
    model = onnx.load(path)
    (two,) = (tensor for tensor in model.graph.initializer if tensor.name == "two")
    two.CopyFrom(numpy_helper.from_array(np.full(2, 2, np.float32), "two"))
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, path)
    rehash(own_bundle)
    problem = problem_of(capsys, "verify", own_bundle, status=5)
    assert (problem["code"], problem["file"]) == ("RM405", "parity/probe.onnx")
    assert problem["message"].startswith("probe_absolute is inf, allowed")


def test_a_case_of_another_shape(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, metadata = read_tensors(own_bundle / CASE)
    kept = {name: tensor.copy() for name, tensor in tensors.items()}
    write_tensors(own_bundle / CASE, {**kept, "hidden": kept["hidden"][:, 1:]}, metadata)
    rehash(own_bundle)
    problem = problem_of(capsys, "verify", own_bundle, status=5)
    assert (problem["code"], problem["file"]) == ("RM405", CASE)
    assert problem["message"].startswith("hidden_relative is inf, allowed")
