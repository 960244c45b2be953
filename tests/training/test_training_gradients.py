"""Gradients are exact, reach every link in every round, and cost memory only as asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import examples, in_float64, on_one, training_graph
from plain_training import PlainTraining
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from training_tolerances import TOLERANCES

MODES = ["teacher_forced", "rollout"]
STEP = 1e-4


def gradients(graph: TrainingGraph, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    graph.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in graph.links.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "family"), [("sequential", "llama"), ("self_loop", "gemma3"), ("mixture", "qwen2")]
)
def test_gradients_are_finite_differences(
    tiny: LoadTiny, family: str, name: str, mode: str
) -> None:
    backbone = in_float64(tiny(family, hidden_size=16, num_hidden_layers=2))
    topology = on_one(name, backbone, steps=2)
    links = {name: link.double() for name, link in random_links(topology).items()}
    graph = training_graph(topology, {"tiny": backbone}, links, mode=mode, supervise="all")
    batch = graph.prepare(examples(topology)[:2])
    found = gradients(graph, lambda: graph(batch).total)
    draw = torch.Generator().manual_seed(0)
    for parameter_name, parameter in graph.links.named_parameters():
        gradient = found[parameter_name].flatten()
        assert gradient.abs().max() > 0, parameter_name
        # The largest entry, whose error shows best, and one at random.
        places = [
            int(gradient.abs().argmax()),
            int(torch.randint(len(gradient), (), generator=draw)),
        ]
        for place in places:
            flat = parameter.data.view(-1)
            sides = []
            for step in (STEP, -STEP):
                flat[place] += step
                with torch.no_grad():
                    sides.append(graph(batch).total.item())
                flat[place] -= step
            difference = (sides[0] - sides[1]) / (2 * STEP)
            error = abs(difference - gradient[place].item())
            rounding = 8 * torch.finfo(torch.float64).eps * sides[0] / STEP
            limit = TOLERANCES["finite_difference_relative"] * gradient.abs().max().item()
            assert error <= limit + rounding, f"{parameter_name}[{place}]"


def assert_gradients_are_plain(backbone: TorchBackbone, mode: str) -> None:
    """Demand the gradients of a form that keeps nothing and splits nothing off."""
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


@pytest.mark.parametrize("mode", MODES)
def test_the_constant_part_costs_no_gradient(tiny: LoadTiny, mode: str) -> None:
    # The plain form splits nothing off.
    assert_gradients_are_plain(tiny("gemma3"), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sequential", "interlocked", "uneven"])
def test_gradients_reach_every_link_in_every_round(tiny: LoadTiny, name: str, mode: str) -> None:
    topology = on_one(name, tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")}, mode=mode)
    batch = graph.prepare(examples(topology))
    graph(batch, watch=True).mean.backward()
    norms = graph.round_gradients()
    expected = set()
    for turn in (*graph.thinking, graph.answer):
        for m in turn.messages:
            expected |= {(m.link, m.round), (f"{m.slot}.inner", m.round)}
    assert set(norms) == expected
    assert min(norms.values()) > 0
    rounds = {round_ for _, round_ in norms}
    last = topology.system.rounds
    assert rounds == set(range(1, last + 1))
    assert graph.round_gradients() == {}
    graph(batch).mean.backward()
    assert graph.round_gradients() == {}


def test_round_gradients_are_those_of_the_messages(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")}, mode="rollout")
    batch = graph.prepare(examples(topology))
    graph(batch, watch=True).total.backward()
    norms = graph.round_gradients()
    kept: dict[int, Tensor] = {}
    bias = graph.link("critic->solver").proj2.bias

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: kept.setdefault(len(kept), gradient))

    handle = graph.link("critic->solver").register_forward_hook(keep)
    graph.zero_grad()
    graph(batch).total.backward()
    handle.remove()
    # Backward meets the last round first.
    for round_, number in ((3, 0), (2, 1), (1, 2)):
        assert norms["critic->solver", round_] == pytest.approx(
            kept[number].norm().item(), rel=TOLERANCES["gradient_relative"]
        )
    # The bias is added at every position, so its gradient is the sum of all that arrives.
    assert torch.allclose(sum(g.sum(0) for g in kept.values()), bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sequential", "mixture"])
def test_checkpointing_changes_no_gradient(tiny: LoadTiny, name: str, mode: str) -> None:
    backbones = {"tiny": tiny("gemma3")}
    topology = on_one(name, backbones["tiny"])
    links = random_links(topology)
    results = []
    for checkpoint_calls in (False, True):
        graph = training_graph(
            topology, backbones, links, mode=mode, checkpoint_calls=checkpoint_calls
        )
        batch = graph.prepare(examples(topology))
        found = gradients(graph, lambda: graph(batch, watch=True).mean)  # noqa: B023
        results.append((found, graph.round_gradients()))
    (kept, kept_norms), (again, again_norms) = results
    for link, gradient in kept.items():
        torch.testing.assert_close(again[link], gradient, rtol=1e-6, atol=1e-7)
    assert again_norms == pytest.approx(kept_norms, rel=1e-6)


def test_checkpointing_keeps_less(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    kept = {}
    for checkpoint_calls in (False, True):
        graph = training_graph(
            topology, {"tiny": tiny("llama")}, mode="rollout", checkpoint_calls=checkpoint_calls
        )
        num_bytes = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_bytes
            num_bytes += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            graph(graph.prepare(examples(topology)))
        kept[checkpoint_calls] = num_bytes
    assert kept[True] < kept[False] / 3


def test_backbones_do_not_learn(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")})
    graph.train()
    assert not graph.frozen.training
    assert graph.links.training
    learning = {name for name, p in graph.named_parameters() if p.requires_grad}
    assert learning == {f"links.{name}" for name, _ in graph.links.named_parameters()}
    graph(graph.prepare(examples(topology))).mean.backward()
    assert all(p.grad is None for p in graph.frozen.parameters())
