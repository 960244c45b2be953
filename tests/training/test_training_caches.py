"""Rows of caches in training: losses, gradients and rows are those of the reference."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn.functional import cross_entropy

from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import (
    carrying,
    examples,
    in_float64,
    on_one,
    training_graph,
)
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.lowering.torch_rows import extend
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph, target_ids
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks.outer import chosen_senders, control_losses
from recmas_runtime.formats.messages import MessageForm, RowsOf
from training_tolerances import TOLERANCES

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def rows(*kinds: RowsOf) -> MessageForm:
    most = 4 if "written" in kinds else None
    return MessageForm(carries="cache", rows=kinds, max_tokens=most)


# Where an agent receives rows, its slots stand behind a text here: the rows come first all the
# same. In the first system nothing learns before the rows, in the others something does.
SYSTEMS = {
    "given_on": ("sequential", {"planner->critic": rows("context")}),
    "two_senders": (
        "diamond",
        {"left->end": rows("context", "thoughts"), "right->end": rows("context")},
    ),
    "some_layers": (
        "sequential",
        {
            "planner->critic": replace(rows("context"), layers=(1,)),
            "critic->solver": rows("thoughts"),
        },
    ),
    "written": ("diamond", {"left->end": rows("written"), "end->start": rows("context")}),
}
NAMES = [
    name if name == "two_senders" else pytest.param(name, marks=pytest.mark.families)
    for name in SYSTEMS
]


def made(tiny: LoadTiny, name: str, family: str) -> tuple[TrainingGraph, TorchSystem, Graph]:
    shape, forms = SYSTEMS[name]
    backbones = {"tiny": tiny(family)}
    system = carrying(on_one(shape, backbones["tiny"]), forms)
    links = random_links(system)
    graph = training_graph(system, backbones, links, mode="rollout")
    return graph, TorchSystem(run_pipeline(system), backbones=backbones, links=links), system


def reference_loss(
    graph: TrainingGraph, reference: TorchSystem, record: TrainExample, sender: TrainExample
) -> Tensor:
    """Return the loss of a record's answer behind the messages of another one."""
    state = reference({"id": sender.id, **sender.fields})
    answer = graph.answer
    if record is not sender:
        (step,) = (s for s in reference.plan.steps if s.op == "prefill" and s.agents == (
            answer.agent,) and s.round == answer.round)  # fmt: skip
        fresh = type(step)(**{**{f: getattr(step, f) for f in step.__struct_fields__},
                              "reuse_prefix": False})  # fmt: skip
        fields = {"id": record.id, **record.fields}
        reference._prefill(answer.agent, answer.variant, fresh, fields, state)
    sequence = state.sequences[answer.agent]
    backbone: TorchBackbone = graph.backbone(answer.agent)
    (call,) = graph.prepare([record]).calls[answer.agent, answer.variant, "turn"]
    ids = torch.tensor(target_ids(call))
    behind = extend(backbone, sequence.cache, backbone.embed(ids[:-1]), sequence.handed)
    logits = backbone.logits(torch.cat([sequence.hidden_11D[0], behind]))
    return cross_entropy(logits, ids, reduction="sum")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_the_reference(
    tiny: LoadTiny, name: str, family: str
) -> None:
    graph, reference, system = made(tiny, name, family)
    records = examples(system)
    loss = graph(graph.prepare(records))
    expected = [reference_loss(graph, reference, record, record) for record in records]
    for found, value in zip(loss.per_record_sum, expected, strict=True):
        assert found.item() == pytest.approx(value.item(), rel=TOLERANCES["loss_relative"])
    if name == "written":  # the reference reads its own text without gradients
        return
    parameters = dict(graph.links.named_parameters())
    gradients = []
    for total in (loss.total, torch.stack(expected).sum()):
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        gradients.append(
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters.values(), found, strict=True)
            ]
        )
    for link, own, other in zip(parameters, *gradients, strict=True):
        error = (own - other).abs().max()
        assert error <= TOLERANCES["gradient_relative"] * other.abs().max(), link
    assert sum(bool(other.abs().max() > 0) for other in gradients[1]) > len(parameters) / 2


def test_gradients_go_through_rows_of_a_text(tiny: LoadTiny) -> None:
    backbone = in_float64(tiny("llama", hidden_size=16, num_hidden_layers=2))
    shape, forms = SYSTEMS["written"]
    # Nothing but rows: whatever arrives has come through them.
    forms = {**forms, "right->end": rows("context")}
    system = carrying(on_one(shape, backbone, steps=2), forms)
    links = {name: link.double() for name, link in random_links(system).items()}
    graph = training_graph(system, {"tiny": backbone}, links, mode="rollout")
    batch = graph.prepare(examples(system)[:2])
    weight = graph.link("start->left").proj2.weight
    (gradient,) = torch.autograd.grad(graph(batch).total, [weight])
    place = int(gradient.abs().argmax())
    flat, sides = weight.data.view(-1), []
    for step in (1e-4, -1e-4):
        flat[place] += step
        with torch.no_grad():
            sides.append(graph(batch).total.item())
        flat[place] -= step
    difference = (sides[0] - sides[1]) / 2e-4
    found = gradient.flatten()[place].item()
    assert difference == pytest.approx(found, rel=TOLERANCES["finite_difference_relative"])


def test_another_records_rows_are_those_of_the_reference(tiny: LoadTiny) -> None:
    graph, reference, system = made(tiny, "two_senders", "llama")
    records = examples(system)
    chosen = chosen_senders(graph, records)
    assert chosen is not None
    found: dict[str, Tensor] = {}
    for control, places, loss in control_losses(graph, records, batch_size=2, world=ALONE):
        found.setdefault(control, torch.zeros(len(records)))[places] = loss.per_record_sum
    assert found.keys() == {"latent", "null", "shuffled"}
    for number, record in enumerate(records):
        sender = records[chosen.senders[number]]
        expected = reference_loss(graph, reference, record, sender).item()
        error = abs(found["shuffled"][number].item() - expected)
        assert error <= TOLERANCES["loss_relative"] * expected


@pytest.mark.parametrize("mode", ["teacher_forced", "rollout"])
@pytest.mark.parametrize("name", NAMES)
def test_lengths_count_rows(tiny: LoadTiny, name: str, mode: str) -> None:
    shape, forms = SYSTEMS[name]
    system = carrying(on_one(shape, tiny("llama")), forms)
    graph = training_graph(system, {"tiny": tiny("llama")}, mode=mode)
    for record in examples(system):
        latents = graph.latents(graph.prepare([record]))
        own = latents.received(graph.answer)
        (row,) = latents._rows(graph.answer, latents._calls(graph.answer, "turn", own), own)
        taken = row.length + (row.front[0].shape[2] if row.front else 0)
        bound = graph.lengths(record)[graph.answer.agent, graph.answer.round]
        # What is written greedily may end early; thoughts of a target may be fewer than steps.
        assert taken == bound if name == "given_on" else bound - 8 <= taken <= bound
