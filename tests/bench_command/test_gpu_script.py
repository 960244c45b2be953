"""`benchmarks/gpu/step.py` where there is no GPU: a tiny shape on the CPU, and refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks/gpu/step.py"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_step", PATH)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["gpu_step"] = module  # its dataclasses look their module up
    found.loader.exec_module(module)
    return module


def run(step: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    step.main()


def test_a_tiny_shape_agrees_with_transformers(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "16", "--steps", "4", "--repeats", "1", "--rows", "1", "3")
    run(step, monkeypatch, "--device", "cpu", "--tiny", *options)
    out, shown = capsys.readouterr()
    found = json.loads(out)
    assert [(row["engine"], row["rows"]) for row in found["rows"]] == [
        ("recmas", 1),
        ("transformers", 1),
        ("recmas", 3),
        ("transformers", 3),
    ]
    for row in found["rows"]:
        if row["engine"] == "recmas":
            assert 0 < row["difference"] <= step.TOLERANCES["float32"]
        assert row["step_ms"] > 0
    assert found["notes"] == []
    assert found["settings"]["cuda_graph"] is False
    assert "| recmas | 1 | " in shown
    shape = step.TINY
    layer = shape.width * (shape.packed + shape.heads * shape.head_dim + 3 * shape.inner)
    numbers = shape.layers * (layer + 2 * shape.width) + shape.width + 3 * shape.width**2
    assert found["step_bytes"] == 4 * numbers


def test_the_large_shape_has_a_billion_weights_and_more(step: ModuleType) -> None:
    shape = step.LARGE
    layer = shape.width * (shape.packed + shape.heads * shape.head_dim + 3 * shape.inner)
    assert 1.6e9 < shape.layers * layer + shape.vocabulary * shape.width < 1.8e9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", "0", "--device", "cpu"), "--steps is 0: give at least 1"),
        (("--rows", "0", "--device", "cpu"), "--rows has 0: give at least 1"),
        pytest.param(
            (),
            "sees no CUDA device; --device cpu --tiny runs anywhere",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_measured(
    step: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(step, monkeypatch, *options)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
