"""The loss of the training graph is what its meaning says, in any batch, after any pass."""

from __future__ import annotations

import pytest
import torch

from kit.graphs import topology
from kit.models import LoadTiny
from kit.systems import declare, random_links
from kit.training import STEPS, TOPOLOGIES, changed_agents, examples, on_one, training_graph
from plain_training import PlainTraining
from recmas_compiler.ir.ops import Level
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from training_tolerances import TOLERANCES

MODES = ["teacher_forced", "rollout"]


def assert_losses(graph: TrainingGraph, plain: PlainTraining) -> None:
    """Every record of a batch has the loss that it has by itself in the plain form."""
    records = examples(plain.topology)
    loss = graph(graph.prepare(records))
    expected = [plain.loss(record) for record in records]
    for found, tokens, (value, num_tokens) in zip(
        loss.per_record_sum, loss.per_record_tokens, expected, strict=True
    ):
        assert tokens.item() == num_tokens
        assert abs(found - value).item() <= TOLERANCES["loss_relative"] * value.item()
    assert loss.tokens == sum(n for _, n in expected)
    total = sum(value.item() for value, _ in expected)
    assert loss.mean.item() == pytest.approx(total / loss.tokens, rel=TOLERANCES["loss_relative"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_loss_is_the_plain_one(tiny: LoadTiny, family: str, name: str, mode: str) -> None:
    backbones = {"tiny": tiny(family)}
    graph = on_one(name, backbones["tiny"])
    links = random_links(graph)
    trained = training_graph(graph, backbones, links, mode=mode)
    assert_losses(
        trained, PlainTraining(topology=graph, backbones=backbones, links=links, mode=mode)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3", "qwen3"])
def test_other_families(tiny: LoadTiny, family: str, mode: str) -> None:
    backbones = {"tiny": tiny(family)}
    graph = on_one("sequential", backbones["tiny"])
    # What the two templates write differently when the assistant has spoken.
    if family == "mistral":
        graph = changed_agents(graph, system=())
    if family == "qwen3":
        graph = changed_agents(graph, chat_template={"enable_thinking": True})
    links = random_links(graph)
    trained = training_graph(graph, backbones, links, mode=mode)
    assert_losses(
        trained, PlainTraining(topology=graph, backbones=backbones, links=links, mode=mode)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["residual", "ln_residual"])
def test_backbones_of_different_width(tiny: LoadTiny, kind: str, mode: str) -> None:
    backbones = {"wide": tiny("llama"), "narrow": tiny("gemma3", hidden_size=48)}
    graph = topology(
        "a b c",
        "a>b b>c c~>a",
        rounds=2,
        steps=STEPS,
        kind=kind,
        backbones=[declare(name, backbone) for name, backbone in backbones.items()],
        backbone_of={"a": "wide", "b": "narrow", "c": "wide"},
    )
    links = random_links(graph)
    trained = training_graph(graph, backbones, links, mode=mode)
    assert_losses(
        trained, PlainTraining(topology=graph, backbones=backbones, links=links, mode=mode)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sequential", "interlocked", "answers_in_the_middle"])
def test_supervising_all_rounds(tiny: LoadTiny, name: str, mode: str) -> None:
    backbones = {"tiny": tiny("llama")}
    graph = on_one(name, backbones["tiny"])
    links = random_links(graph)
    trained = training_graph(graph, backbones, links, mode=mode, supervise="all")
    plain = PlainTraining(topology=graph, backbones=backbones, links=links, mode=mode, weight=0.1)
    assert_losses(trained, plain)
    rounds = trained(trained.prepare(examples(graph))).rounds
    assert sorted(rounds) == list(range(1, graph.system.rounds + 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sequential", "mixture", "interlocked"])
def test_passes_do_not_change_the_loss(tiny: LoadTiny, name: str, mode: str) -> None:
    backbones = {"tiny": tiny("llama")}
    graph = on_one(name, backbones["tiny"])
    links = random_links(graph)
    found = []
    for end in range(len(PIPELINE) + 1):
        program = run_pipeline(graph, passes=PIPELINE[:end])
        if program.level >= Level.UNROLLED:
            trained = training_graph(
                graph, backbones, links, program=program, mode=mode, supervise="all"
            )
            found.append(trained(trained.prepare(examples(graph))).mean.item())
    assert len(found) == len(PIPELINE) - 1
    assert found == pytest.approx([found[0]] * len(found), rel=TOLERANCES["loss_relative"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_record_does_not_see_its_batch(tiny: LoadTiny, family: str, mode: str) -> None:
    graph = on_one("sequential", tiny(family))
    trained = training_graph(graph, {"tiny": tiny(family)}, mode=mode)
    records = examples(graph)
    together = trained(trained.prepare(records)).per_record_sum
    reversed_ = trained(trained.prepare(records[::-1])).per_record_sum.flip(0)
    alone = torch.stack([trained(trained.prepare([r])).per_record_sum[0] for r in records])
    for other in (reversed_, alone):
        assert torch.allclose(other, together, rtol=TOLERANCES["loss_relative"], atol=0.0)


@pytest.mark.parametrize("name", ["sequential", "diamond", "uneven"])
def test_rollouts_are_those_of_the_reference(tiny: LoadTiny, name: str) -> None:
    backbones = {"tiny": tiny("gemma3")}
    graph = on_one(name, backbones["tiny"])
    links = random_links(graph)
    trained = training_graph(graph, backbones, links, mode="rollout")
    reference = TorchSystem(run_pipeline(graph), backbones=backbones, links=links)
    records = examples(graph)
    latents = trained.latents(trained.prepare(records))
    for number, record in enumerate(records):
        state = reference({"id": record.id, **record.fields})
        assert set(state.thoughts_MD) == set(latents.thoughts_MD)
        for (agent, round_), expected in state.thoughts_MD.items():
            found = latents.thoughts_MD[agent, round_][number]
            assert (found - expected).abs().max() <= TOLERANCES["latent_absolute"]
        for (link, round_), expected in state.messages_ME.items():
            found = latents.message(link, round_)[number]
            assert (found - expected).abs().max() <= TOLERANCES["latent_absolute"]


@pytest.mark.parametrize("mode", MODES)
def test_lengths_are_those_of_the_calls(tiny: LoadTiny, mode: str) -> None:
    graph = on_one("sequential", tiny("llama"))
    trained = training_graph(graph, {"tiny": tiny("llama")}, mode=mode, supervise="all")
    record = examples(graph)[0]
    batch = trained.prepare([record])
    lengths = trained.lengths(record)
    assert set(lengths) == {(s.agent, s.round) for s in trained.thinking} | {("solver", 3)}
    latents = trained.latents(batch)
    first = batch.calls["planner", "first", "prompt"][0].num_positions({})
    turn = batch.calls["solver", "then", "turn"][0]
    assert lengths["solver", 3] == turn.num_positions(
        {"critic": len(latents.message("critic->solver", 3)[0])}
    )
    if mode == "rollout":
        assert lengths["planner", 1] == first + STEPS - 1
