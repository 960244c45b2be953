"""Controls change what the answer agent's slots get in the last round, and nothing else."""

from __future__ import annotations

import pytest
import torch

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import examples, on_one, training_graph
from plain_training import PlainTraining
from recmas_compiler.lowering.training_graph.latents import controlled
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks.outer import OuterTask
from training_tolerances import TOLERANCES

MODES = ["teacher_forced", "rollout"]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
CONTROLS = ["none", "null", "shuffled", "mean"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", ["sequential", "mixture", "self_loop"])
def test_controls_are_what_they_say(tiny: LoadTiny, name: str, control: str, mode: str) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one(name, backbones["tiny"])
    links = random_links(topology)
    graph = training_graph(topology, backbones, links, mode=mode)
    records = examples(topology)
    plain = PlainTraining(topology=topology, backbones=backbones, links=links, mode=mode)
    answer = topology.system.answer_agent
    slots = topology.system.agents[answer].slots("then")
    sent: list[dict[str, torch.Tensor]] = []
    for record in records:
        plain.loss(record)
        seen = plain._seen(answer, topology.system.rounds)
        sent.append({slot: seen[slot] for slot in slots})
    loss = graph.compare(graph.prepare(records), controls=[control])[control]
    for number, record in enumerate(records):
        given = {}
        for slot in slots:
            own = [messages[slot] for messages in sent]
            longest = max(len(message) for message in own)
            have = [[m for m in own if len(m) > i] for i in range(longest)]
            given[slot] = {
                "none": own[number],
                "null": own[number][:0],
                "shuffled": own[(number + 1) % len(own)],
                "mean": torch.stack([sum(m[i] for m in ms) / len(ms) for i, ms in enumerate(have)]),
            }[control]
        plain.last_slots = given
        expected, _ = plain.loss(record)
        plain.last_slots = None
        found = loss.per_record_sum[number]
        assert abs(found - expected).item() <= TOLERANCES["loss_relative"] * expected.item()


def test_comparing_is_one_pass_per_control(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")}, mode="rollout")
    batch = graph.prepare(examples(topology))
    compared = graph.compare(batch, controls=CONTROLS)
    values = [loss.mean.item() for loss in compared.values()]
    alone = [graph.compare(batch, controls=[control])[control] for control in CONTROLS]
    assert values == [loss.mean.item() for loss in alone]
    assert len(set(values)) == len(CONTROLS)


def test_a_teacher_forced_graph_can_be_measured_by_rollout(tiny: LoadTiny) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    links = random_links(topology)
    forced = training_graph(topology, backbones, links)
    rolled = training_graph(topology, backbones, links, mode="rollout")
    records = examples(topology)
    batch = forced.prepare(records)
    found = forced.compare(batch, controls=["none"], mode="rollout")["none"].mean.item()
    assert found == rolled(rolled.prepare(records)).mean.item()
    assert found != forced(batch).mean.item()


@pytest.mark.parametrize("mode", MODES)
def test_held_out_figures_are_those_of_the_answers_own_round(tiny: LoadTiny, mode: str) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    links = random_links(topology)
    records = examples(topology)

    def measured(supervise: str) -> dict[str, float]:
        graph = training_graph(topology, backbones, links, mode=mode, supervise=supervise)
        task = OuterTask(graph, {}, train=(), held_out=records, batch_size=len(records))
        return dict(task.measure(ALONE))

    assert measured("all") == measured("final")


def test_a_lone_record_cannot_be_shuffled() -> None:
    with pytest.raises(AssertionError, match="no other record"):
        controlled([torch.zeros(2, 3)], "shuffled")


def test_empty_messages_have_an_empty_mean() -> None:
    assert [len(m) for m in controlled([torch.zeros(0, 3)] * 2, "mean")] == [0, 0]
