"""How rows depend on positions is found for every way in which a model has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.models import load_folder, write_tiny_backbone
from kit.zoo import SEEING, ZOO, write_zoo_model
from recmas_compiler.backbones.config.rotary import why_rows_stay
from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import (
    cache_of,
    empty_cache,
    row_names,
    tensors_of,
)
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.layers import RowPositions, has_states
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.sequences.moved_keys import moved_keys

LIMIT = TOLERANCES["moved_rows_relative"] / 5
# Whole chunks of those that attend in chunks of 12: what sees what stays as it is.
OFFSET = 36

Write = Callable[[Path], Path]


def zoo(name: str) -> Write:
    return lambda folder: write_zoo_model(folder, name)


def tiny(family: str, **dims: object) -> Write:
    return lambda folder: write_tiny_backbone(folder, family, **dims)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

# name -> (what writes it, by tensor its layout, first number and pairs that turn)
CASES: dict[str, tuple[Write, dict[str, tuple[str, int, int]]]] = {
    "llama": (tiny("llama"), {f"key.{i}": ("halves", 0, 8) for i in range(3)}),
    "llama3 scaling": (
        tiny("llama", rope_parameters=LLAMA3),
        {f"key.{i}": ("halves", 0, 8) for i in range(3)},
    ),
    "linear scaling": (
        tiny("llama", rope_parameters=LINEAR),
        {f"key.{i}": ("halves", 0, 8) for i in range(3)},
    ),
    "yarn": (zoo("llama yarn"), {f"key.{i}": ("halves", 0, 8) for i in range(2)}),
    "longrope": (zoo("phi3 longrope"), {f"key.{i}": ("halves", 0, 8) for i in range(2)}),
    "qwen2": (tiny("qwen2"), {f"key.{i}": ("halves", 0, 8) for i in range(3)}),
    "qwen3": (tiny("qwen3"), {f"key.{i}": ("halves", 0, 12) for i in range(3)}),
    "a part of each key": (zoo("phi"), {f"key.{i}": ("halves", 0, 4) for i in range(2)}),
    "interleaved": (zoo("cohere"), {f"key.{i}": ("pairs", 0, 8) for i in range(2)}),
    "a part, interleaved": (zoo("glm"), {f"key.{i}": ("pairs", 0, 6) for i in range(2)}),
    "sines in a table": (zoo("gptj"), {f"key.{i}": ("pairs", 0, 4) for i in range(2)}),
    "the other way": (zoo("nanochat"), {f"key.{i}": ("halves", 0, 8) for i in range(2)}),
    "two bases": (tiny("gemma3"), {f"key.{i}": ("halves", 0, 8) for i in range(4)}),
    "layers without": (zoo("smollm3"), {"key.0": ("halves", 0, 8)}),
    "in chunks": (zoo("llama4_text"), {"key.0": ("pairs", 0, 8)}),
    "latent attention": (zoo("deepseek_v3"), {f"value.{i}": ("halves", 0, 4) for i in range(2)}),
    "latent, interleaved": (zoo("deepseek_v2"), {f"value.{i}": ("pairs", 0, 4) for i in range(2)}),
    "biases of distance": (zoo("bloom"), {}),
}


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[TorchBackbone, dict[str, tuple[str, int, int]]]:
    """Give the backbone of a case and what turns in it."""
    write, expected = CASES[request.param]
    return load_folder(write(tmp_path / "model")), expected


def test_moved_rows_are_those_that_a_model_computes_there(
    case: tuple[TorchBackbone, dict[str, tuple[str, int, int]]],
) -> None:
    backbone, expected = case
    positions, names = backbone.row_positions, row_names(backbone.facts.layers)
    assert forms(positions) == expected
    assert set(positions.tensors.values()) == set(range(len(positions.rotations)))

    first, second = random_ids(backbone, 5), random_ids(backbone, 4, seed=1)
    here, _ = run(backbone, first, 0)
    there, _ = run(backbone, first, OFFSET)
    moved = [
        torch.from_numpy(moved_keys(rows.numpy(), positions.of_tensor(name), OFFSET))
        for name, rows in zip(names, here, strict=True)
    ]
    for rows, wanted in zip(moved, there, strict=True):
        assert difference(rows, wanted) < LIMIT
    turned = [name for name, old, new in zip(names, here, moved, strict=True)
              if difference(old, new) > 0.1]  # fmt: skip
    assert turned == [name for name in names if name in expected]

    # What is read behind them sees what it saw at its old place: all of it has moved.
    _, before = run(backbone, second, 5, behind=here)
    _, behind = run(backbone, second, 5 + OFFSET, behind=moved)
    assert difference(behind, before) < LIMIT


def test_layers_of_two_bases_have_two_tables(tmp_path: Path) -> None:
    """Gemma 3: local layers turn by the base of 10,000, global ones by a million."""
    positions = load_folder(write_tiny_backbone(tmp_path, "gemma3")).row_positions
    slowest = [positions.rotations[positions.tensors[f"key.{i}"]].inv_freq[-1] for i in range(4)]
    local, wide = (base ** (-7 / 8) for base in (1e4, 1e6))
    assert slowest == pytest.approx([local, wide, local, local], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "no rotation makes them of those at other positions"),
        ("hunyuan_v1_dense", "no rotation makes them of those at other positions"),
        ("qwen3_5_text", "its layers keep states"),
    ],
)
def test_rows_that_cannot_be_moved_are_refused_by_name(name: str, why: str, tmp_path: Path) -> None:
    backbone = load_folder(write_zoo_model(tmp_path / "model", name))
    with pytest.raises(RecmasError) as caught:
        _ = backbone.row_positions
    (problem,) = caught.value.problems
    assert problem.code == "RM202"
    assert str(tmp_path / "model") in problem.message
    assert f"({name}) cannot be moved to other positions: {why}" in problem.message


@pytest.mark.families
@pytest.mark.parametrize("name", [*ZOO, *SEEING])
def test_what_a_config_tells_is_what_is_measured(name: str, tmp_path: Path) -> None:
    backbone = load_folder(write_zoo_model(tmp_path / "model", name))
    facts = backbone.facts
    known = why_rows_stay(facts.model_type) is not None or has_states(facts.layers)
    assert stays(backbone) == known


def stays(backbone: TorchBackbone) -> bool:
    try:
        return backbone.row_positions is None
    except RecmasError:
        return True


def forms(positions: RowPositions) -> dict[str, tuple[str, int, int]]:
    rotations = {name: positions.rotations[index] for name, index in positions.tensors.items()}
    return {name: (r.layout, r.start, len(r.inv_freq)) for name, r in rotations.items()}


def random_ids(backbone: TorchBackbone, count: int, *, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(backbone.facts.vocab_size, (1, count), generator=draws)


@torch.no_grad()
def run(
    backbone: TorchBackbone, ids: Tensor, first: int, *, behind: list[Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Run a model at positions from `first` on; return the rows and the hidden states."""
    layers = backbone.facts.layers
    cache = empty_cache(layers) if behind is None else cache_of(layers, behind)
    hidden = backbone.body(
        inputs_embeds=backbone.embed(ids),
        position_ids=first + torch.arange(ids.shape[1])[None],
        **with_cache(backbone.body, cache),
    ).last_hidden_state
    return list(tensors_of(cache, layers)), hidden


def difference(found: Tensor, expected: Tensor) -> float:
    return float(np.abs((found - expected).numpy()).max() / np.abs(expected.numpy()).max())
