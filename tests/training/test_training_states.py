"""Layers that keep a state, in the reference and in training: what a cache goes on from."""

from __future__ import annotations

import pytest

from kit.models import load_folder
from kit.systems import assert_agree, naive_result, random_links, reference_result
from kit.training import examples, on_one, training_graph
from kit.zoo import write_zoo_model
from plain_training import PlainTraining
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.passes.pipeline import run_pipeline
from test_training_gradients import MODES, gradients
from training_tolerances import TOLERANCES

NAMES = ("qwen3_5_text", "kimi_linear", "bamba", "falcon_h1", "jamba")


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
    backbones, topology = {"tiny": backbone}, on_one("sequential", backbone)
    links = random_links(topology)
    graph = training_graph(topology, backbones, links, mode=mode)
    records = examples(topology)
    plain = PlainTraining(topology=topology, backbones=backbones, links=links, mode=mode)
    batch = graph.prepare(records)
    found = gradients(graph, lambda: graph(batch).total)
    expected = gradients(graph, lambda: sum(plain.loss(record)[0] for record in records))
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= TOLERANCES["gradient_relative"] * gradient.abs().max(), name
