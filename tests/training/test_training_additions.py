"""What the outer stage adds to the answer's cross-entropy, against its meaning written down."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import softmax

import recmas_compiler as rc
from kit.models import LoadTiny
from kit.systems import random_links
from kit.training import carrying, changed, examples, on_one, training_graph, write_case
from plain_training import WORD, PlainTraining
from recmas_compiler.lowering.training_graph.calls import REPEAT
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.spec.schema.train import OuterStageSection
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import AtStep
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_compiler.training.tasks.additions import Additions, share_at
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.running.controls import exchange
from training_tolerances import TOLERANCES

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
FORMS = {
    "critic->solver": MessageForm(carries="context", of="question", every=2),
    "planner->critic": MessageForm(carries="written", max_tokens=5),
}
STEP = AtStep(step=3, steps=11, places=(0, 1, 2))


def made(tiny: LoadTiny, **settings: Any) -> tuple[TrainingGraph, PlainTraining, Additions]:
    """Return a system of three agents in both forms, with additions on all links."""
    backbones = {"tiny": tiny("llama")}
    system = carrying(on_one("sequential", backbones["tiny"]), FORMS)
    links = random_links(system)
    plain = PlainTraining(topology=system, backbones=backbones, links=links, mode="rollout")
    graph = training_graph(system, backbones, links, mode="rollout")
    return graph, plain, additions(graph, plain, **settings)


def additions(graph: TrainingGraph, plain: PlainTraining, **settings: Any) -> Additions:
    stage = OuterStageSection.model_validate(settings)
    return Additions(graph, stage, learning=plain.links, train=examples(plain.topology), seed=5)


def answers(plain: PlainTraining) -> list[tuple[float, int]]:
    found = [plain.loss(record) for record in examples(plain.topology)]
    return [(loss.item(), tokens) for loss, tokens in found]


def close(found: Tensor, expected: float) -> bool:
    return found.item() == pytest.approx(expected, rel=10 * TOLERANCES["loss_relative"])


def test_a_mismatch_is_a_hinge_on_another_records_messages(tiny: LoadTiny) -> None:
    _, plain, added = made(tiny, mismatch={"weight": 0.5, "margin": 0.3})
    records = examples(plain.topology)
    own = answers(plain)
    seen = []
    for record in records:
        plain.loss(record)
        seen.append(plain._seen("solver", 3))
    partners = added._partners_at(STEP)
    assert sorted(partners) == sorted(partners.values()) == [0, 1, 2]
    assert all(place != other for place, other in partners.items())
    hinge = 0.0
    for place, record in enumerate(records):
        plain.last_slots = seen[partners[place]]
        other, tokens = plain.loss(record)
        plain.last_slots = None
        hinge += tokens * max(0.0, 0.3 - (other.item() - own[place][0]) / tokens)
    loss = added.loss([0, 1, 2], STEP)
    assert hinge > 0
    assert close(loss.parts["mismatch"], hinge)
    assert close(loss.parts["answer"], sum(value for value, _ in own))
    assert close(loss.total, sum(value for value, _ in own) + 0.5 * hinge)


def test_partners_say_something_else() -> None:
    found = exchange([("Yes.",), ("no",), ("yes",), ("No",)], None, seed=1).senders
    assert all({0, 2} != {place, sender} != {1, 3} for place, sender in enumerate(found))


def test_a_step_without_two_answers_has_no_mismatch(tiny: LoadTiny) -> None:
    _, plain, added = made(tiny, mismatch={})
    lone = AtStep(step=0, steps=1, places=(1, 1))
    assert added._partners_at(lone) == {}
    loss = added.loss([1, 1], lone)
    assert loss.parts.keys() == {"answer"}
    assert close(loss.total, 2 * answers(plain)[1][0])


def test_pieces_of_a_step_add_up(tiny: LoadTiny) -> None:
    everything = {
        "mismatch": {"margin": 0.3}, "teacher": {}, "reconstruct": 0.2, "mix": {}, "center": True,
    }  # fmt: skip
    graph, _, added = made(tiny, **everything)
    whole = added.loss([0, 1, 2], STEP)
    whole.total.backward()
    expected = {name: p.grad.clone() for name, p in graph.links.named_parameters()}
    sums = {link: total.clone() for link, total in added._sums.items()}
    figures = added.figures(1.0)
    graph.zero_grad()
    added._sums = {link: torch.zeros_like(total) for link, total in sums.items()}
    for piece in ([0], [2, 1]):
        added.loss(piece, STEP).total.backward()
    for name, parameter in graph.links.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= TOLERANCES["gradient_relative"] * expected[name].abs().max(), name
    for name, value in added.figures(1.0)["parts"].items():
        assert value == pytest.approx(figures["parts"][name], rel=1e-4), name
    for link, total in added._sums.items():
        torch.testing.assert_close(total, sums[link], rtol=1e-5, atol=1e-4)


def test_a_teacher_reads_text(tiny: LoadTiny) -> None:
    _, plain, added = made(tiny, teacher={"weight": 2.0, "temperature": 1.5})
    records = examples(plain.topology)
    backbone = plain.backbones["tiny"]

    def chances(record: Any) -> Tensor:
        seen = plain._seen("solver", 3) | (plain.last_slots or {})
        states, ids = plain._read("solver", record, seen)
        return softmax(backbone.logits(states[-len(ids) - 1 : -1]) / 1.5, dim=-1)

    divergence = 0.0
    for record in records:
        plain.loss(record)
        student = chances(record)
        plain.last_slots = {"critic": str(record.fields["question"])}
        teacher = chances(record)
        plain.last_slots = None
        divergence += 1.5**2 * (teacher * (teacher / student).log()).sum().item()
    loss = added.loss([0, 1, 2], STEP)
    assert close(loss.parts["teacher"], divergence)
    assert close(loss.total - loss.parts["answer"], 2.0 * divergence)


def test_a_message_alone_is_written_out(tiny: LoadTiny) -> None:
    _, plain, added = made(tiny, reconstruct=0.7)
    backbone, tokenizer = plain.backbones["tiny"], plain.backbones["tiny"].tokenizer
    total = 0.0
    for record, (_, tokens) in zip(examples(plain.topology), answers(plain), strict=True):
        plain.loss(record)
        said = {
            ("planner->critic", 3): record.targets["planner"],
            ("critic->solver", 3): str(record.fields["question"]),
            ("solver->planner", 2): record.targets["solver"],
        }
        losses = []
        for (link, round_), text in said.items():
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": f"[[slot]]{REPEAT}"}],
                tokenize=False,
                add_generation_prompt=True,
            )
            answered = tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": f"[[slot]]{REPEAT}"},
                    {"role": "assistant", "content": WORD},
                ],
                tokenize=False,
            ).replace(WORD, text)
            before, after = (
                tokenizer(piece, add_special_tokens=False).input_ids
                for piece in answered.split("[[slot]]")
            )
            boundary = len(asked.split("[[slot]]")[1])
            offsets = tokenizer(
                answered.split("[[slot]]")[1],
                add_special_tokens=False,
                return_offsets_mapping=True,
            ).offset_mapping
            count = sum(first >= boundary for first, _ in offsets)
            embeds = torch.cat(
                [
                    backbone.embed(torch.tensor(before)),
                    plain.messages[link, round_],
                    backbone.embed(torch.tensor(after)),
                ]
            )
            states = backbone.body(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
            logits = backbone.logits(states[0, -count - 1 : -1]).log_softmax(-1)
            losses.append(-logits[range(count), after[-count:]].mean().item())
        total += tokens * sum(losses) / len(losses)
    loss = added.loss([0, 1, 2], STEP)
    assert close(loss.parts["reconstruct"], total)
    assert close(loss.total - loss.parts["answer"], 0.7 * total)


def test_messages_are_text_to_begin_with(tiny: LoadTiny) -> None:
    graph, plain, added = made(tiny, mix={"start": 0.75, "end": 0.25})
    first, last = (AtStep(step=step, steps=11, places=(0, 1, 2)) for step in (0, 10))
    mix = added._stage.mix
    assert [share_at(mix, at) for at in (first, STEP, last)] == [0.75, 0.6, 0.25]
    record = examples(plain.topology)[0]
    batch = graph.prepare([record])
    own = graph.latents(batch)
    (message,) = own.message("critic->solver", 3)
    ids = graph.writer.received_ids("solver", str(record.fields["question"]))
    said = plain.backbones["tiny"].embed(torch.tensor(ids))
    mixed = graph.latents(batch, mix=SimpleNamespace(share=0.6, said=lambda link, record: said))
    (found,) = mixed.message("critic->solver", 3)
    assert len(found) == round(0.4 * len(message)) + round(0.6 * len(said))
    assert torch.equal(found[-round(0.6 * len(said)) :], said[-round(0.6 * len(said)) :])
    plain_loss = sum(value for value, _ in answers(plain))
    assert not close(added.loss([0, 1, 2], first).total, plain_loss)
    none = additions(graph, plain, mix={"start": 0.0})
    assert close(none.loss([0, 1, 2], first).total, plain_loss)


def test_a_centred_link_gives_no_mean(tiny: LoadTiny) -> None:
    graph, plain, added = made(tiny, center=True)
    at = AtStep(step=0, steps=5, places=(0, 1, 2))
    added.loss([0, 1, 2], at)
    before = {link: graph.link(link).offset.detach().clone() for link in FORMS}
    added.finish_step(at, ALONE)
    batch = graph.prepare(examples(plain.topology))
    # The answer's own messages depend on this link alone: its prompt is the same in each round.
    latents = graph.latents(batch)
    sent = [torch.cat(latents.message("critic->solver", round_)) for round_ in (1, 2, 3)]
    assert torch.cat(sent).mean(0).abs().max() < 0.2 * before["critic->solver"].abs().max() + 0.2
    assert all(not torch.equal(graph.link(link).offset, before[link]) for link in FORMS)


ADDED = """\
  outer: {steps: 8, lr: 1e-3, batch_size: 4, mismatch: {margin: 0.5}, teacher: {},
    reconstruct: 0.1, mix: {start: 0.5}, center: true, rates: {inner: 1e-4, planner: 5e-4}}
"""


def run(folder: str, *, stop_at: int = 0) -> dict[str, Tensor]:
    """Train the outer stage, as far as a step if that is given; return every link's tensors."""

    def sink(_stage: str) -> Callable[[Mapping[str, Any]], None]:
        def stop(entry: Mapping[str, Any]) -> None:
            if entry["kind"] == "step" and entry["step"] == stop_at:
                signal.raise_signal(signal.SIGINT)

        return stop

    program = rc.compile(rc.load_spec(f"{folder}.yaml"))
    rc.train(program, folder, stage="outer", resume=Path(folder).exists(), make_sink=sink)
    return {
        f"{path.name}/{name}": tensor
        for path in sorted(Path("links", folder).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_a_run_goes_on_bit_for_bit(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.parent)
    text = changed(("  outer: {steps: 8, lr: 1e-3, batch_size: 4}\n", ADDED))
    for folder in ("whole", "parts"):
        write_case(case.parent, text=text + f"  links_dir: links/{folder}\n").rename(
            f"{folder}.yaml"
        )
    whole = run("whole")
    assert run("parts", stop_at=4) == {}
    again = run("parts")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    entries = list(read_json_lines(Path("whole/outer") / METRICS_NAME))
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert steps[0]["parts"].keys() == {"answer", "mismatch", "teacher", "reconstruct", "mix"}
    assert [steps[0]["parts"]["mix"], steps[-1]["parts"]["mix"]] == [0.5, 0.0]
    receipt = json.loads(Path("links/whole/receipt.json").read_text())
    assert receipt["settings"]["outer"]["rates"] == {"inner": 1e-4, "planner": 5e-4}


def test_links_have_rates_of_their_own(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.parent)
    rates = '{solver: 1e-6, outer: 2e-6, "planner -> solver": 1e-2}'
    text = changed(
        ("  outer: {steps: 8, lr: 1e-3,", f"  outer: {{rates: {rates}, steps: 2, lr: 1e-3,")
    )
    write_case(case.parent, text=text)
    rc.train(rc.compile(rc.load_spec(case)), "run", stage="outer")
    moved = {}
    for path in Path("run/outer/start").glob("*.safetensors"):
        before, after = load_file(path), load_file(Path("links/pair") / path.name)
        moved[path.name] = max(float((after[name] - before[name]).abs().max()) for name in before)
    # AdamW moves every weight by about its rate in each of the two steps.
    rates_of = {
        "inner.planner": 1e-3, "inner.solver": 1e-6,
        "outer.planner.solver": 1e-2, "outer.solver.planner": 2e-6,
    }  # fmt: skip
    for name, rate in rates_of.items():
        assert 0.5 * rate < moved[f"{name}.safetensors"] < 2 * rate, name
