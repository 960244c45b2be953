"""What a build keeps of how rows are moved: only where some are, and only if they can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit.models import load_folder, load_tiny
from kit.zoo import write_zoo_model
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.torch_rows import cut_rows, join_rows
from recmas_compiler.spec.spec import parse_spec
from recmas_export.assemble import positions_of_moved_rows
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.interface import behind_sink

READERS = """\
recmas: 1
name: readers
backbones:
  tiny: {source: llama}
agents:
  left: {backbone: tiny, prompt: "Read {{ question }}"}
  right: {backbone: tiny, prompt: "Read {{ question }} aloud"}
  solver: {backbone: tiny, prompt: "{{ latent.left }}{{ latent.right }}Answer"}
links:
  left -> solver: {carries: cache}
  right -> solver: {carries: cache}
answer: {agent: solver}
build: {max_prompt_tokens: 512}
"""


def topology(text: str, folder: Path) -> Graph:
    return build_topology(parse_spec(text, base_dir=folder))


def test_rows_that_are_moved_are_measured(tmp_path: Path) -> None:
    backbone = load_tiny(tmp_path / "llama", "llama")
    found = positions_of_moved_rows(topology(READERS, tmp_path), lambda _: backbone.row_positions)
    assert found == {"tiny": backbone.row_positions}
    assert found["tiny"].tensors.keys() == {"key.0", "key.1", "key.2"}


def test_rows_that_stay_are_not(tmp_path: Path) -> None:
    load_tiny(tmp_path / "llama", "llama")
    text = READERS.replace("right -> solver: {carries: cache}", "right -> solver: {}")
    assert positions_of_moved_rows(topology(text, tmp_path), pytest.fail) == {}


def test_a_build_refuses_what_only_the_model_tells(tmp_path: Path) -> None:
    """As of a family whose config says nothing of it: here the weights are another family's."""
    load_tiny(tmp_path / "llama", "llama")
    other = load_folder(write_zoo_model(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(RecmasError, match=r"RM202.*cannot be moved to other positions"):
        positions_of_moved_rows(topology(READERS, tmp_path), lambda _: other.row_positions)


def test_rows_from_behind_others_come_behind_the_first_of_their_cache(tmp_path: Path) -> None:
    backbone = load_tiny(tmp_path / "llama", "llama")
    (layer, *_) = backbone.facts.layers
    assert layer.rows is not None
    shape = (1, layer.rows.heads, 9, layer.rows.key_width)
    cache = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    begin, middle = cut_rows(cache, 0, 4), cut_rows(cache, 4, 9)
    assert behind_sink([]) == []
    assert behind_sink([begin, middle]) == [begin, middle]
    joined = join_rows(behind_sink([middle]), backbone)
    assert [tensor.shape[2] for tensor in joined] == [6] * 6
    for rows, whole in zip(joined, cache, strict=True):
        assert torch.equal(rows[:, :, :1], whole[:, :, :1])
    # Values know no place, keys are turned to theirs.
    assert torch.equal(joined[1][:, :, 1:], cache[1][:, :, 4:])
    assert not torch.allclose(joined[0][:, :, 1:], cache[0][:, :, 4:])
