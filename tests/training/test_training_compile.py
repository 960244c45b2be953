"""Compiled calls: whole graphs, few of them, the same numbers, and a way back that says why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import TOPOLOGIES, examples, on_one, training_graph
from recmas_compiler.lowering.training_graph.agent_calls import Compiled, CompileWarning
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from training_tolerances import TOLERANCES


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def steps(graph: TrainingGraph, lengths: list[int]) -> list[float]:
    """Train a step on records of each length; return the losses."""
    losses = []
    for length in lengths:
        records = [
            TrainExample(
                id=str(number),
                index=number,
                fields={"question": "Why? " * (length + 3 * number)},
                targets=dict.fromkeys(graph.system.agents, "So. " * (length - number)),
            )
            for number in range(2)
        ]
        loss = graph(graph.prepare(records)).mean
        loss.backward()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param("llama", "teacher_forced", marks=pytest.mark.heavy),
        ("llama", "rollout"),
        pytest.param("gemma3", "teacher_forced", marks=pytest.mark.heavy),
        pytest.param("gemma3", "rollout", marks=pytest.mark.heavy),
    ],
)
def test_new_lengths_compile_nothing_anew(
    tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    # What is traced does not depend on what the graphs are turned into; this is fast.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    backbone = tiny(family, num_hidden_layers=1)
    topology = on_one("sequential", backbone)
    links = random_links(topology)
    graph = training_graph(topology, {"tiny": backbone}, links, mode=mode, compile_calls=True)
    eager = training_graph(topology, {"tiny": backbone}, links, mode=mode)
    first = steps(graph, [10])
    after_one = num_graphs()
    rest = steps(graph, [3, 18, 29, 37, 11])
    assert counters["graph_break"] == {}
    # Inner link, on states with and without gradients, and outer link; a call with and without a
    # constant part; in rollouts the latent step, on a cache with and without gradients.
    assert after_one <= 9
    assert num_graphs() == after_one
    expected = steps(eager, [10, 3, 18, 29, 37, 11])
    assert first + rest == pytest.approx(expected, rel=TOLERANCES["loss_relative"])


@pytest.mark.heavy
def test_checkpointed_calls_compile(tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    backbone = tiny("llama", num_hidden_layers=1)
    topology = on_one("mixture", backbone)
    links = random_links(topology)
    found = []
    for options in ({}, {"compile_calls": True, "checkpoint_calls": True}):
        graph = training_graph(topology, {"tiny": backbone}, links, mode="rollout", **options)
        graph.zero_grad()
        graph(graph.prepare(examples(topology)), watch=True).mean.backward()
        found.append({name: p.grad.clone() for name, p in graph.links.named_parameters()})
        found.append(graph.round_gradients())
    eager, norms, compiled, compiled_norms = found
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)
    assert compiled_norms == pytest.approx(norms, rel=TOLERANCES["gradient_relative"])


needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="torch.compile makes CPU kernels with a C++ compiler, and there is none",
)


@pytest.mark.heavy
@needs_compiler
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("mode", ["teacher_forced", "rollout"])
def test_compiled_loss_is_the_eager_one_everywhere(tiny: LoadTiny, name: str, mode: str) -> None:
    assert_compiled_is_eager(tiny, name, mode)


@needs_compiler
def test_compiled_loss_is_the_eager_one(tiny: LoadTiny) -> None:
    assert_compiled_is_eager(tiny, "self_loop", "teacher_forced")


def assert_compiled_is_eager(tiny: LoadTiny, name: str, mode: str) -> None:
    backbone = tiny("llama", num_hidden_layers=1, hidden_size=32)
    topology = on_one(name, backbone)
    links = random_links(topology)
    losses, gradients = [], []
    for compile_calls in (False, True):
        graph = training_graph(
            topology, {"tiny": backbone}, links, mode=mode, compile_calls=compile_calls
        )
        graph.zero_grad()
        loss = graph(graph.prepare(examples(topology))).mean
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in graph.links.named_parameters()})
    assert counters["graph_break"] == {}
    assert num_graphs() > 0
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCES["compiled_loss_relative"])
    for parameter, gradient in gradients[0].items():
        error = (gradients[1][parameter] - gradient).abs().max()
        assert error <= TOLERANCES["compiled_gradient_relative"] * gradient.abs().max(), parameter


def test_what_cannot_be_compiled_runs_eagerly_and_says_why() -> None:
    def branch(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    compiled = Compiled(branch, name="a branch")
    with pytest.warns(CompileWarning, match="a branch runs eagerly.*[Bb]ranch"):
        assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
    assert compiled(-torch.ones(2)).tolist() == [-2.0, -2.0]


def test_gradients_that_cannot_be_compiled_are_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_module: torch.fx.GraphModule, _inputs: object) -> None:
        raise NotImplementedError("no kernel for gradients")

    backend = aot_autograd(fw_compiler=lambda module, _inputs: module, bw_compiler=refuse)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    doubling = Compiled(lambda x: (x * 2).sin(), name="doubling")
    for length in (3, 5):
        x = torch.zeros(length, requires_grad=True)
        with pytest.warns(CompileWarning) if length == 3 else nullcontext():
            y = doubling(x)
        y.sum().backward()
        assert x.grad.tolist() == [2.0] * length


def test_a_missing_compiler_is_named() -> None:
    def double(x: Tensor) -> Tensor:
        return (x * 2).sin()

    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/c++")})
    with (
        torch._inductor.utils.fresh_cache(),
        missing,
        pytest.warns(CompileWarning, match="doubling runs eagerly"),
    ):
        assert Compiled(double, name="doubling")(torch.zeros(3)).tolist() == [0.0] * 3
