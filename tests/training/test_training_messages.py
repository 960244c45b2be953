"""Messages of prompts, of written text and of plain text, in training: what their meaning says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recmas_compiler as rc
from kit.graphs import topology
from kit.models import LoadTiny
from kit.systems import declare, random_links
from kit.training import (
    carrying,
    changed,
    examples,
    in_float64,
    on_one,
    training_graph,
    write_case,
)
from plain_training import PlainTraining
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.tasks.outer import CONTROLS, chosen_senders, control_losses
from recmas_runtime.formats.messages import MessageForm
from test_training_loss import MODES, assert_losses
from training_tolerances import TOLERANCES

ALONE = World(rank=0, size=1, device=torch.device("cpu"))

CONTEXT = MessageForm(carries="context")
FIELD = MessageForm(carries="context", of="question", every=3)
MEANS = MessageForm(carries="context", pool=True)
WRITTEN = MessageForm(carries="written", max_tokens=5)
TEXT = MessageForm(carries="text", max_tokens=6)

# Topology, and what its links carry where they do not carry thoughts.
ALL_KINDS = "of_all_kinds"
SYSTEMS: dict[str, tuple[str, dict[str, MessageForm]]] = {
    "context": ("sequential", {"planner->critic": CONTEXT, "critic->solver": FIELD}),
    "means": ("sequential", {"planner->critic": MEANS, "critic->solver": CONTEXT}),
    "written": ("sequential", {"planner->critic": WRITTEN, "critic->solver": WRITTEN}),
    "text": ("sequential", {"planner->critic": TEXT, "solver->planner": TEXT}),
    ALL_KINDS: (
        "diamond",
        {
            "start->left": WRITTEN,
            "start->right": CONTEXT,
            "left->end": TEXT,
            "end->start": FIELD,
        },
    ),
    "side_by_side": ("mixture", {"math->end": FIELD, "end->code": WRITTEN}),
}


# One system has every kind; the others are for when there is time.
NAMES = [
    name if name == ALL_KINDS else pytest.param(name, marks=pytest.mark.families)
    for name in SYSTEMS
]


def system(name: str, tiny: LoadTiny, family: str = "llama") -> Graph:
    shape, forms = SYSTEMS[name]
    return carrying(on_one(shape, tiny(family)), forms)


def on_both(
    graph: Graph, tiny: LoadTiny, mode: str, family: str = "llama"
) -> tuple[TrainingGraph, PlainTraining]:
    backbones = {"tiny": tiny(family)}
    links = random_links(graph)
    plain = PlainTraining(topology=graph, backbones=backbones, links=links, mode=mode)
    return training_graph(graph, backbones, links, mode=mode), plain


def gradients(graph: TrainingGraph, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the gradients of all links; zeros where only text has come from an agent."""
    graph.zero_grad()
    loss().backward()
    parameters = graph.links.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_plain_one(tiny: LoadTiny, name: str, mode: str) -> None:
    assert_losses(*on_both(system(name, tiny), tiny, mode))


@pytest.mark.families
@pytest.mark.parametrize("mode", MODES)
def test_a_window_changes_nothing(tiny: LoadTiny, mode: str) -> None:
    assert_losses(*on_both(system(ALL_KINDS, tiny, "gemma3"), tiny, mode, "gemma3"))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "side_by_side"])
def test_gradients_are_plain(tiny: LoadTiny, name: str) -> None:
    graph, plain = on_both(system(name, tiny), tiny, "rollout")
    records = examples(plain.topology)
    batch = graph.prepare(records)
    # What is kept from the first pass is used in the second one.
    gradients(graph, lambda: graph(batch).total)
    found = gradients(graph, lambda: graph(batch).total)
    expected = gradients(graph, lambda: sum(plain.loss(record)[0] for record in records))
    for link, gradient in expected.items():
        error = (found[link] - gradient).abs().max()
        assert error <= TOLERANCES["gradient_relative"] * gradient.abs().max(), link


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_those_of_the_reference(tiny: LoadTiny, name: str) -> None:
    graph, plain = on_both(system(name, tiny), tiny, "rollout")
    reference = TorchSystem(
        run_pipeline(plain.topology), backbones=plain.backbones, links=plain.links
    )
    records = examples(plain.topology)
    latents = graph.latents(graph.prepare(records))
    for number, record in enumerate(records):
        sent = reference({"id": record.id, **record.fields}).messages
        assert sent
        for (link, round_), expected in sent.items():
            if isinstance(expected, tuple):
                pieces = latents._kept_rows[link, round_][number]
                assert [p.position for p in pieces] == [p.position for p in expected]
                for piece, other in zip(pieces, expected, strict=True):
                    for rows, others in zip(piece.tensors, other.tensors, strict=True):
                        assert rows.shape == others.shape
                        assert (rows - others).abs().max() <= TOLERANCES["latent_absolute"]
            elif isinstance(expected, str):
                source = plain.topology.system.links[link].source
                assert latents.texts[source, round_][number] == expected
            else:
                found = latents.message(link, round_)[number]
                assert found.shape == expected.shape
                assert (found - expected).abs().max() <= TOLERANCES["latent_absolute"]


def test_gradients_are_finite_differences(tiny: LoadTiny) -> None:
    backbone = in_float64(tiny("llama", hidden_size=16, num_hidden_layers=2))
    graph = carrying(
        on_one("diamond", backbone, steps=2),
        {"start->left": WRITTEN, "start->right": CONTEXT, "left->end": MEANS},
    )
    links = {name: link.double() for name, link in random_links(graph).items()}
    trained = training_graph(graph, {"tiny": backbone}, links)
    batch = trained.prepare(examples(graph)[:2])
    found = gradients(trained, lambda: trained(batch).total)
    step = 1e-4
    for name, parameter in trained.links.named_parameters():
        if not name.endswith("proj2.weight"):
            continue
        gradient = found[name].flatten()
        place = int(gradient.abs().argmax())
        flat, sides = parameter.data.view(-1), []
        for side in (step, -step):
            flat[place] += side
            with torch.no_grad():
                sides.append(trained(batch).total.item())
            flat[place] -= side
        difference = (sides[0] - sides[1]) / (2 * step)
        rounding = 8 * torch.finfo(torch.float64).eps * sides[0] / step
        limit = TOLERANCES["finite_difference_relative"] * gradient.abs().max().item()
        assert abs(difference - gradient[place].item()) <= limit + rounding, name


def test_what_no_link_changes_is_read_once(tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = declare("tiny", tiny("llama"))
    pair = topology("math code end", "math>end code>end", rounds=1, backbones=[declared])
    pair = carrying(pair, {"math->end": FIELD, "code->end": CONTEXT})
    graph = training_graph(pair, {"tiny": tiny("llama")})
    calls = graph._agent_calls["tiny"]
    num_read: list[int] = []
    read = calls.read
    monkeypatch.setattr(
        calls, "read", lambda rows, constants: num_read.append(len(rows)) or read(rows, constants)
    )
    records = examples(pair)
    first = graph(graph.prepare(records[:2])).per_record_sum
    again = graph(graph.prepare(records)).per_record_sum
    # Both senders' prompts one by one, and the answer's; then those of the one new record.
    assert num_read == [1, 1, 1, 1, 2, 1, 1, 3]
    assert torch.allclose(again[:2], first, rtol=TOLERANCES["loss_relative"], atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_controls_of_every_kind(tiny: LoadTiny, name: str) -> None:
    graph, plain = on_both(system(name, tiny), tiny, "rollout")
    records = examples(plain.topology)
    found: dict[str, Tensor] = {}
    for control, places, loss in control_losses(graph, records, batch_size=2, world=ALONE):
        found.setdefault(control, torch.zeros(len(records)))[places] = loss.per_record_sum
    has_text = any(graph.plan.links[m.link].carries == "text" for m in graph.answer.messages)
    assert list(found) == [c for c in CONTROLS if c != "mean" or not has_text]
    chosen = chosen_senders(graph, records)
    assert chosen is not None
    sent = []
    for record in records:
        plain.loss(record)
        answer = plain.topology.system.answer_agent
        sent.append(plain._seen(answer, plain.topology.system.rounds))
    for number, record in enumerate(records):
        plain.last_slots = sent[chosen.senders[number]]
        expected = plain.loss(record)[0].item()
        plain.last_slots = None
        error = abs(found["shuffled"][number].item() - expected)
        assert error <= TOLERANCES["loss_relative"] * expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_those_of_the_calls(tiny: LoadTiny, name: str, mode: str) -> None:
    graph, _ = on_both(system(name, tiny), tiny, mode)
    answer = graph.answer.agent, graph.answer.round
    received = [graph.plan.links[message.link].carries for message in graph.answer.messages]
    for record in examples(graph.program):
        batch = graph.prepare([record])
        latents = graph.latents(batch)
        own = latents.received(graph.answer)
        (row,) = latents._rows(graph.answer, latents._calls(graph.answer, "turn", own), own)
        bound = graph.lengths(record)[answer]
        if mode == "teacher_forced" and "text" not in received:
            assert row.length == bound
        else:  # what is written greedily may end early, and a text is other tokens elsewhere
            assert row.length <= bound + 3 * TEXT.max_tokens * received.count("text")


def test_a_run_of_several_kinds(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, with an agent that only reads and one whose inner link nothing passes."""
    monkeypatch.chdir(case.parent)
    reader = "  reader: {backbone: tiny, prompt: 'Read {{ question }}', inner: {init: random}}\n"
    text = changed(
        ("  planner:\n", f"{reader}  planner:\n"),
        ("Use {{ latent.planner }}", "Use {{ latent.planner }} {{ latent.reader }}"),
        ("  planner -> solver: {}\n", "  planner -> solver: {carries: written, max_tokens: 4}\n"
         "  reader -> solver: {carries: context, of: question, every: 2, init: random}\n"),
        ("{feedback: true}", "{carries: text, max_tokens: 3, feedback: true}"),
        ("{steps: 12,", "{steps: 2,"),
        ("{steps: 8,", "{mode: rollout, center: true, steps: 2,"),
    )  # fmt: skip
    write_case(case.parent, text=text)
    report = rc.train(rc.compile(rc.load_spec(case)), "run", stage="outer")
    assert set(report.trained) == {
        "planner.inner", "reader.inner", "planner->solver", "reader->solver",
    }  # fmt: skip
    figures = report.stages["outer"]["after"]
    assert figures.keys() == {"latent", "null", "shuffled", "mean"}
    assert len({round(value, 6) for value in figures.values()}) == len(figures)
    names = sorted(path.name for path in Path("links/pair").glob("*.safetensors"))
    assert names == [
        "inner.planner.safetensors",
        "inner.reader.safetensors",
        "outer.planner.solver.safetensors",
        "outer.reader.solver.safetensors",
    ]
