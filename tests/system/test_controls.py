"""Other records' messages in the answer agent's slots, and texts scored behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.specs import SPECS
from naive_texts import EMPTY, NaiveTexts
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running.controls import exchange
from recmas_runtime.running.scoring import Scores, read_candidates
from recmas_runtime.running.system import System

QUESTIONS = ["What is 7 * 8?", "Anna has three plans and an orange.", "Hm?", "How long?", "x"]
RECORDS = [rt.Record(id=str(i), fields={"question": q}, index=i) for i, q in enumerate(QUESTIONS)]
# Of one token and several, and not as many for every record.
CANDIDATES = [["x", "an orange"], ["three", "no", "Anna"], ["y"], ["two hours", "2"], ["x", "yy"]]


@pytest.fixture(params=SPECS)
def built(request: pytest.FixtureRequest, build_tiny: BuildTiny) -> Built:
    return build_tiny(SPECS[request.param])


def scores(system: System, candidates: list[list[str]] = CANDIDATES) -> list[Scores]:
    found = system.score_batch(RECORDS, candidates)
    assert all(isinstance(one, Scores) for one in found), found
    return [one for one in found if isinstance(one, Scores)]


def in_slots(built: Built, control: str) -> list[list[torch.Tensor]]:
    """Return by record the messages in the answer agent's slots, in the prompt's order."""
    system = built.topology.system
    agent = system.agents[system.answer_agent]
    messages = built.naive([dict(record.fields) for record in RECORDS]).messages
    senders = exchange([()] * len(RECORDS), [(q,) for q in QUESTIONS]).senders
    found: list[list[torch.Tensor]] = [[] for _ in RECORDS]
    for part in agent.then:
        if part.kind != "slot":
            continue
        link = system.links[f"{part.value}->{agent.name}"]
        sent_in = system.rounds - 1 if link.feedback else system.rounds
        for place, sender in enumerate(senders):
            if system.agents[part.value].latent_steps == 0:
                found[place].append(torch.zeros(0, link.weights.out_dim))
                continue
            message = messages[f"{link.id}@{sent_in}"]
            others = [message[i] for i in range(len(RECORDS)) if i != place]
            found[place].append(
                {
                    "latent": message[place],
                    "null": message[place][:0],
                    "shuffled": message[sender],
                    "mean": torch.stack(others).mean(dim=0),
                }[control]
            )
    return found


@pytest.mark.parametrize("control", ["latent", "null", "shuffled", "mean"])
def test_candidates_are_scored_as_by_plain_forward_passes(
    built: Built, families: Path, control: str
) -> None:
    system = built.topology.system
    agent = system.agents[system.answer_agent]
    found = scores(built.system.baseline(control))
    for place, inserted in enumerate(in_slots(built, control)):
        fields = RECORDS[place].fields
        user = "".join(
            EMPTY
            if part.kind == "slot"
            else part.value
            if part.kind == "text"
            else str(fields[part.value])
            for part in agent.then
        )
        naive = NaiveTexts(built.topology, families)
        expected = naive.losses(agent.name, user, fields, CANDIDATES[place], inserted=inserted)
        one = found[place]
        assert one.candidates == tuple(CANDIDATES[place])
        assert one.losses == pytest.approx(expected, rel=TOLERANCES["text_loss_relative"])


def test_controls_run_the_other_agents_for_the_sender(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["mixture"]).system
    own, shuffled = scores(system), scores(system.baseline("shuffled"))
    assert [one.losses for one in own] != [one.losses for one in shuffled]
    # Every record sends once, so all together they take the same.
    steps = [one.usage.latent_steps for one in own]
    assert [one.usage.latent_steps for one in shuffled] == steps
    tokens = [sum(one.usage.prompt_tokens for one in found) for found in (own, shuffled)]
    assert tokens[0] == tokens[1]
    assert own[0].usage.completion_tokens == 0


@pytest.mark.parametrize("name", ["shuffled", "mean"])
def test_a_set_is_cut_into_any_batches(build_tiny: BuildTiny, name: str) -> None:
    system = build_tiny(SPECS["heterogeneous"]).system
    limits = structs.replace(system.plan.limits, max_batch=2)
    pairs = system.with_plan(structs.replace(system.plan, limits=limits))
    whole = scores(system.baseline(name))
    parts = scores(pairs.baseline(name))
    over = system.baseline(name).over(RECORDS)
    alone = [over.score_batch([r], [c])[0] for r, c in zip(RECORDS, CANDIDATES, strict=True)]
    for one, other, single in zip(whole, parts, alone, strict=True):
        assert isinstance(single, Scores)
        np.testing.assert_allclose(one.losses, other.losses, rtol=TOLERANCES["text_loss_relative"])
        np.testing.assert_allclose(one.losses, single.losses, rtol=TOLERANCES["text_loss_relative"])
    texts = [answer.answer for answer in system.baseline(name).run(RECORDS)]
    assert texts == [over.run(record).answer for record in RECORDS]


def test_records_with_one_answer_do_not_send_to_each_other(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["loop"]).system.baseline("shuffled")
    answers = [["Yes"], ["no"], ["yes."], ["No"], ["maybe"]]
    covered = system.over(RECORDS, answers=answers, seed=3).covered
    assert covered is not None
    for place, record in enumerate(RECORDS):
        other = answers[int(covered.sender(record).id)][0].lower()[:2]
        assert other != answers[place][0].lower()[:2]
    with pytest.raises(rt.RecmasError, match=r"RM508.*all others have the answer 'a'"):
        system.over(RECORDS, answers=[["a"]] * 5)
    with pytest.raises(rt.RecmasError, match=r"RM508.*not among those"):
        system.over(RECORDS[:3]).run(RECORDS[4])


def test_controls_need_slots_and_two_records(build_tiny: BuildTiny) -> None:
    slotless = """
recmas: 1
name: alone
backbones: {tiny: {source: llama}}
agents: {solver: {backbone: tiny, prompt: "{{ question }}", inner: {init: random}}}
answer: {agent: solver, max_new_tokens: 4}
"""
    alone = build_tiny(slotless).system
    for name in ("shuffled", "mean"):
        with pytest.raises(rt.RecmasError, match=rf"RM508.*{name}: the answer agent has no slot"):
            alone.baseline(name)
        system = build_tiny(SPECS["loop"]).system.baseline(name)
        with pytest.raises(rt.RecmasError, match=r"RM508.*there is only one"):
            system.run("What?")
        with pytest.raises(rt.RecmasError, match=r"RM508.*there is only one"):
            system.stream("What?")


def test_names_of_version_0_1_are_taken(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["loop"]).system
    assert system.baseline("null-latents").plan == system.baseline("null").plan
    assert system.baseline("shuffled-latents")._control == "shuffled"


def test_text_that_is_handed_over_has_no_mean(build_tiny: BuildTiny) -> None:
    texts = build_tiny(SPECS["loop"]).system.baseline("text")
    with pytest.raises(rt.RecmasError, match=r"RM508.*carries text, which has no mean"):
        texts.baseline("mean")
    # What a message is does not matter to `shuffled`.
    assert len(texts.baseline("shuffled").run(["a", "b", "c"])) == 3


def test_candidates_that_cannot_be_read(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["loop"]).system
    asked = [["x", " "], ["x", "y " * 2000], ["x", "y", "x"], [], ["x"]]
    *refused, scored = system.score_batch(["a", "b", "c", "d", "e"], asked)
    assert isinstance(scored, Scores)
    problems = [one.problems[0] for one in refused if isinstance(one, rt.RecmasError)]
    assert [problem.code for problem in problems] == ["RM500", "RM501", "RM500", "RM500"]
    for problem, told in zip(
        problems,
        ["candidate ' ' is empty", "a candidate of", "'x' is there twice", "no candidates"],
        strict=True,
    ):
        assert told in problem.message


def test_a_space_is_put_before_candidates_in_the_middle_of_a_line(build_tiny: BuildTiny) -> None:
    tokenizer = build_tiny(SPECS["loop"]).system._answer_chat.tokenizer
    record = RECORDS[0]

    def read(before: tuple[int, ...]) -> tuple[int, ...]:
        found = read_candidates([" x y\n"], before, tokenizer, record=record, num_rows=10**6)
        return found[" x y\n"]

    with_space, without = (tokenizer.encode_piece(t, continues=True) for t in (" x y", "x y"))
    assert with_space != without
    assert read(tokenizer.encode_piece("Answer:")) == with_space
    assert read(tokenizer.encode_piece("Answer:\n")) == without
    assert (
        read((*tokenizer.encode_piece("Answer:"), next(iter(tokenizer.special_texts)))) == without
    )
    assert read(()) == without


SPLIT = """
recmas: 1
name: split
latent_steps: 3
backbones: {{tiny: {{source: llama}}}}
agents:
  reader: {{backbone: tiny, inner: {{init: random}}, prompt: "Read: {{{{ context }}}}"}}
  solver:
    {{backbone: tiny, inner: {{init: random}}, prompt: "{{{{ latent.reader }}}}{{{{ question }}}}"}}
links:
  reader -> solver: {link}
answer: {{agent: solver, max_new_tokens: 12}}
build: {{max_prompt_tokens: 384, max_batch: 8}}
"""
LINKS = {
    "thoughts": "{init: random}",
    "context": "{init: random, carries: context}",
    "text": "{carries: text, max_tokens: 5}",
    "cache": "{carries: cache}",
}


@pytest.mark.parametrize("carries", LINKS)
def test_shuffled_is_the_question_with_another_records_passage(
    build_tiny: BuildTiny, carries: str
) -> None:
    """Whatever a message is, and however long."""
    system = build_tiny(SPLIT.format(link=LINKS[carries])).system
    passages = ["an orange is red", "x", "three plans and a long train to Rome"]
    asked = [
        rt.Record(id=str(i), fields={"context": c, "question": f"What {i}?"}, index=i)
        for i, c in enumerate(passages)
    ]
    shuffled = system.baseline("shuffled").over(asked, answers=[["a"], ["b"], ["c"]])
    texts = [["an orange", "x"]] * 3
    found = shuffled.score_batch(asked, texts)
    assert shuffled.covered is not None
    spliced = [
        {**one.fields, "context": shuffled.covered.sender(one).fields["context"]} for one in asked
    ]
    expected = system.score_batch(spliced, texts)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Scores)
        assert isinstance(other, Scores)
        assert one.losses == pytest.approx(other.losses, rel=TOLERANCES["text_loss_relative"])
    if carries in ("text", "cache"):
        with pytest.raises(rt.RecmasError, match=rf"RM508.*carries {carries}, which has no mean"):
            system.baseline("mean")
    else:
        assert all(isinstance(s, Scores) for s in system.baseline("mean").score_batch(asked, texts))
