"""The name of a model's cache argument changes between versions of transformers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kit.engines import Exported, identity_link, random_ids, relative
from kit.models import load_tiny
from recmas_compiler.backbones.loaded.cache_argument import cache_argument, with_cache
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.open_torch import TransformersEngine
from recmas_compiler.bench.torch_engine import TorchEngine
from recmas_compiler.links.calibration import sample_answers
from recmas_compiler.lowering.torch_rows import extend
from recmas_compiler.lowering.training_graph.agent_calls import _bodies
from recmas_export.backbone_graph import export_backbone
from recmas_export.parity import _greedy
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import TOLERANCES


def rename(module: nn.Module) -> None:
    """Give a module the `forward` of a later transformers: another name, others are swallowed."""
    kind = type(module)
    current = cache_argument(module)
    if current == "cache":
        return

    class Renamed(kind):  # type: ignore[misc,valid-type]
        def forward(self, input_ids: Any = None, *, cache: Any = None, **kwargs: Any) -> Any:
            kwargs.pop(current, None)
            return super().forward(input_ids, **{current: cache}, **kwargs)

    Renamed.__name__, Renamed.__qualname__ = kind.__name__, kind.__qualname__
    module.__class__ = Renamed


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> TorchBackbone:
    return load_tiny(tmp_path_factory.mktemp("usual"), "llama")


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> TorchBackbone:
    backbone = load_tiny(tmp_path_factory.mktemp("renamed"), "llama")
    rename(backbone.body)
    assert cache_argument(backbone.body) == "cache"
    return backbone


class Older(nn.Module):
    def forward(self, x: Any, past_key_values: Any = None, **kwargs: Any) -> None: ...


class Newer(nn.Module):
    def forward(self, x: Any, cache: Any = None, **kwargs: Any) -> None: ...


class Without(nn.Module):
    def forward(self, x: Any, **kwargs: Any) -> None: ...


def test_the_name_is_read_from_the_model() -> None:
    assert cache_argument(Older()) == "past_key_values"
    assert with_cache(Newer(), 7) == {"cache": 7, "use_cache": True}
    with pytest.raises(RecmasError, match=r"RM202.*Without takes no cache"):
        cache_argument(Without())


@torch.no_grad()
def test_the_reference_remembers(usual: TorchBackbone, renamed: TorchBackbone) -> None:
    embeds = usual.embed(random_ids(usual, 1, 6))
    found = []
    for backbone in (usual, renamed):
        cache = DynamicCache()
        extend(backbone, cache, embeds[0, :4], ())
        found.append(extend(backbone, cache, embeds[0, 4:], ()))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], extend(usual, DynamicCache(), embeds[0, 4:], ()))


@torch.no_grad()
def test_training_remembers(usual: TorchBackbone, renamed: TorchBackbone) -> None:
    embeds = usual.embed(random_ids(usual, 1, 6))
    places = torch.arange(6)[None]
    found = []
    for backbone in (usual, renamed):
        _, extend = _bodies(backbone)
        _, rows = extend(embeds[:, :4], None, places[:, :4])
        found.append(extend(embeds[:, 4:], None, places[:, 4:], *rows)[0])
    assert torch.equal(*found)


@torch.no_grad()
def test_greedy_text_is_the_same(usual: TorchBackbone) -> None:
    prompt = random_ids(usual, 1, 5)[0]
    whole = replace(usual, model=deepcopy(usual.model))
    rename(whole.model)
    assert cache_argument(whole.model) == "cache"
    assert _greedy(usual, prompt) == _greedy(whole, prompt)


def test_samples_are_the_same(usual: TorchBackbone, renamed: TorchBackbone) -> None:
    pairs = zip(sample_answers(usual), sample_answers(renamed), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("kind", [TransformersEngine, TorchEngine])
def test_engines_in_torch_remember(kind: Any, usual: TorchBackbone, renamed: TorchBackbone) -> None:
    inner = stack_operands([identity_link(usual.facts.width)])
    ids = random_ids(usual, 1, 6).numpy()
    zero = np.zeros(1, np.int64)
    found = []
    for backbone in (usual, renamed):
        engine = kind(replace(backbone, model=deepcopy(backbone.model)))
        cache = engine.new_cache(1, 16)
        engine.forward(cache, engine.embed(ids[:, :4]), zero, zero + 3, inner)
        found.append(engine.forward(cache, engine.embed(ids[:, 4:]), zero + 4, zero + 1, inner)[1])
    assert np.array_equal(*found)


def test_engines_are_the_same(renamed: TorchBackbone, tmp_path: Path) -> None:
    export_backbone(renamed, tmp_path)
    case = Exported(renamed, tmp_path, was_changed=False)
    ids = random_ids(renamed, 1, 9)
    cache, embeds = case.new_cache(1), case.embed(ids)
    parts = [
        case.call(cache, embeds[:, start:end], write_index=[start])["hidden"]
        for start, end in ((0, 5), (5, 9))
    ]
    assert relative(np.concatenate(parts, 1), case.reference(ids)) < TOLERANCES["hidden_relative"]
