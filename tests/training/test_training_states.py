"""Layers that keep a state, in the reference and in training: what a cache goes on from."""

from __future__ import annotations

import pytest

from kit.models import load_folder
from kit.systems import assert_agree, naive_result, random_links, reference_result
from kit.training import on_one
from kit.zoo import write_zoo_model
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.passes.pipeline import run_pipeline
from test_training_gradients import MODES, assert_gradients_are_plain

NAMES = ("qwen3_5_text", "kimi_linear", "bamba", "falcon_h1", "jamba", "mamba2")


@pytest.fixture(
    scope="module",
    params=[
        name if name == NAMES[0] else pytest.param(name, marks=pytest.mark.families)
        for name in NAMES
    ],
)
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TorchBackbone:
    return load_folder(write_zoo_model(tmp_path_factory.mktemp("model"), request.param))


def test_the_reference_is_the_naive_form(backbone: TorchBackbone) -> None:
    graph = on_one("sequential", backbone)
    links, backbones = random_links(graph), {"tiny": backbone}
    assert_agree(
        reference_result(run_pipeline(graph), backbones, links),
        naive_result(graph, backbones, links),
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_without_a_cache(backbone: TorchBackbone, mode: str) -> None:
    assert_gradients_are_plain(backbone, mode)
