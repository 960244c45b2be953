"""Controls change what the answer agent's slots get in the last round, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import examples, on_one, training_graph
from plain_training import PlainTraining
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks.outer import CONTROLS, OuterTask, control_losses
from recmas_runtime.running.controls import exchange
from training_tolerances import TOLERANCES

MODES = ["teacher_forced", "rollout"]
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def sent_messages(plain: PlainTraining, records: list[TrainExample]) -> list[dict[str, Tensor]]:
    """Return by record what the answer agent's slots hold in the last round."""
    system = plain.topology.system
    found = []
    for record in records:
        plain.loss(record)
        seen = plain._seen(system.answer_agent, system.rounds)
        slots = system.agents[system.answer_agent].slots("then")
        found.append({slot: seen[slot] for slot in slots})
    return found


def found_losses(graph: TrainingGraph, records: list[TrainExample], size: int) -> dict[str, Tensor]:
    """Return by control the loss of each record."""
    found: dict[str, Tensor] = {}
    for name, places, loss in control_losses(graph, records, batch_size=size, world=ALONE):
        found.setdefault(name, torch.zeros(len(records)))[places] = loss.per_record_sum
    return found


@pytest.mark.parametrize("name", ["sequential", "mixture", "self_loop"])
def test_controls_are_what_they_say(tiny: LoadTiny, name: str) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one(name, backbones["tiny"])
    links = random_links(topology)
    graph = training_graph(topology, backbones, links)
    records = examples(topology)
    plain = PlainTraining(topology=topology, backbones=backbones, links=links, mode="rollout")
    sent = sent_messages(plain, records)
    senders = exchange(
        [(record.targets[topology.system.answer_agent],) for record in records],
        [(str(record.fields["question"]),) for record in records],
    ).senders
    assert sorted(senders) == list(range(len(records)))
    found = found_losses(graph, records, 2)
    assert list(found) == list(CONTROLS)
    for control, losses in found.items():
        for place, record in enumerate(records):
            others = [messages for i, messages in enumerate(sent) if i != place]
            plain.last_slots = {
                slot: {
                    "latent": own,
                    "null": own[:0],
                    "shuffled": sent[senders[place]][slot],
                    "mean": torch.stack([messages[slot] for messages in others]).mean(dim=0),
                }[control]
                for slot, own in sent[place].items()
            }
            expected, _ = plain.loss(record)
            plain.last_slots = None
            difference = abs(losses[place] - expected).item()
            assert difference <= TOLERANCES["loss_relative"] * expected.item()
    assert len({float(losses.sum()) for losses in found.values()}) == len(CONTROLS)


def test_controls_do_not_depend_on_the_batches(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")})
    records = examples(topology)
    parts, whole = (found_losses(graph, records, size) for size in (1, len(records)))
    for name in CONTROLS:
        torch.testing.assert_close(parts[name], whole[name])


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_read_from_any_messages(tiny: LoadTiny, mode: str) -> None:
    """Of other records too, and where these are shorter or longer than the record's own."""
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    links = random_links(topology)
    graph = training_graph(topology, backbones, links, mode=mode)
    records = examples(topology)
    plain = PlainTraining(topology=topology, backbones=backbones, links=links, mode=mode)
    sent = sent_messages(plain, records)
    batch = graph.prepare(records)
    received = graph.received(batch)
    lengths = {len(message) for messages in received.values() for message in messages}
    assert (len(lengths) > 1) == (mode == "teacher_forced")
    turned = {slot: [*messages[1:], messages[0]] for slot, messages in received.items()}
    loss = graph.answer_loss(batch, turned)
    for place, record in enumerate(records):
        plain.last_slots = sent[(place + 1) % len(records)]
        expected, _ = plain.loss(record)
        difference = abs(loss.per_record_sum[place] - expected).item()
        assert difference <= TOLERANCES["loss_relative"] * expected.item()
    own = graph.answer_loss(batch, received)
    assert own.mean.item() == graph(batch).mean.item()


def test_a_teacher_forced_graph_is_measured_by_rollout(tiny: LoadTiny) -> None:
    backbones = {"tiny": tiny("llama")}
    topology = on_one("sequential", backbones["tiny"])
    links = random_links(topology)
    forced = training_graph(topology, backbones, links, mode="teacher_forced")
    rolled = training_graph(topology, backbones, links, mode="rollout")
    records = examples(topology)
    found = found_losses(forced, records, len(records))["latent"]
    assert torch.equal(found, rolled(rolled.prepare(records)).per_record_sum)
    assert not torch.equal(found, forced(forced.prepare(records)).per_record_sum)


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


def test_what_cannot_be_measured_is_left_out(tiny: LoadTiny) -> None:
    topology = on_one("sequential", tiny("llama"))
    graph = training_graph(topology, {"tiny": tiny("llama")}, mode="rollout")
    records = examples(topology)
    answerer = topology.system.answer_agent
    agreeing = [replace(r, targets={**r.targets, answerer: "Same."}) for r in records]
    for held_out, names in ((records[:1], ["latent", "null"]), (agreeing, None)):
        task = OuterTask(graph, {}, train=(), held_out=held_out, batch_size=2)
        expected = names or [name for name in CONTROLS if name != "shuffled"]
        assert list(task.measure(ALONE)) == expected
        assert task.control_figures() == {}
    task = OuterTask(graph, {}, train=(), held_out=records, batch_size=2)
    assert task.control_figures() == {
        "records": len(records), "seed": 0, "repeated": 0, "same_input": 0,
    }  # fmt: skip
