"""Drafted text is the text without drafts, wherever it ends and whoever else runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.specs import ANSWER
from recmas_runtime.formats.plan import SpeculationPlan
from recmas_runtime.formats.precisions import PRECISIONS
from recmas_runtime.scheduling.shared_engine import SharedEngine
from recmas_runtime.sequences.drafts import DraftedRow

# An agent that writes for another one, and one that answers.
WRITERS = f"""
recmas: 1
name: writers
backbones: {{tiny: {{source: llama}}}}
latent_steps: 0
agents:
  scribe: {{backbone: tiny, prompt: "{{{{ question }}}} again {{{{ question }}}}"}}
  solver:
    backbone: tiny
    prompt: "{{{{ question }}}} {{{{ latent.scribe }}}} So {{{{ question }}}}"
links:
  scribe -> solver: {{carries: text, max_tokens: 16}}
{ANSWER}
"""
QUESTIONS = ("one two one two", "a b a b a b", "7 * 8 = 56, 8 * 7 =", "x")


@pytest.fixture(scope="module")
def built(build_tiny: BuildTiny) -> Built:
    drafts = "max_new_tokens: 12, speculation: {max_draft: 5}"
    return build_tiny(WRITERS.replace("max_new_tokens: 12", drafts))


@pytest.fixture(scope="module")
def systems(built: Built) -> dict[str, rt.System]:
    """The system without drafts, and with short and long ones."""
    system = built.system
    return {
        "none": system.with_plan(structs.replace(system.plan, speculation=None)),
        "short": drafting(system, max_draft=1, min_match=2),
        "long": drafting(system, max_draft=12, min_match=1),
    }


def drafting(system: rt.System, **settings: Any) -> rt.System:
    return system.with_plan(structs.replace(system.plan, speculation=SpeculationPlan(**settings)))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[DraftedRow]:
    """The texts that were drafted in a test."""
    made: list[DraftedRow] = []
    plain = DraftedRow.__init__

    def kept(self: DraftedRow, *given: Any) -> None:
        plain(self, *given)
        made.append(self)

    monkeypatch.setattr(DraftedRow, "__init__", kept)
    return made


def test_texts_stay_the_same(systems: dict[str, rt.System], rows: list[DraftedRow]) -> None:
    for question, most in product(QUESTIONS, (1, 3, 40)):
        plain = systems["none"].run(question, max_new_tokens=most)
        for name in ("short", "long"):
            drafted = systems[name].run(question, max_new_tokens=most)
            assert drafted.answer == plain.answer, (question, most, name)
            assert drafted.finish_reason == plain.finish_reason
            assert drafted.usage == plain.usage
        pieces = systems["long"].stream(question, max_new_tokens=most)
        assert "".join(pieces) == plain.answer
    accepted = [row.num_accepted for row in rows]
    assert sum(accepted) > 50
    assert any(0 < row.num_accepted < row.num_drafted for row in rows), "some are partly wrong"


def test_a_text_ends_within_a_draft(
    systems: dict[str, rt.System], rows: list[DraftedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = systems["none"].run(QUESTIONS[1], max_new_tokens=40).answer
    # A stop string begins at every place; most lie in what is drafted.
    for start in range(4, len(whole) - 3, 11):
        stop = (whole[start : start + 3],)
        texts = [s.run(QUESTIONS[1], max_new_tokens=40, stop=stop) for s in systems.values()]
        assert len({(t.answer, t.finish_reason, t.usage.completion_tokens) for t in texts}) == 1
    settings = systems["none"].loaded.engines.decoder_settings
    tokens = settings["tiny"].tokenizer.encode(whole)
    ended = []
    for token_id in sorted(set(tokens))[:5]:
        other = dataclasses.replace(settings["tiny"], eos_token_ids=frozenset({token_id}))
        monkeypatch.setitem(settings, "tiny", other)
        texts = [s.run(QUESTIONS[1], max_new_tokens=40) for s in systems.values()]
        assert len({(t.answer, t.finish_reason, repr(t.usage)) for t in texts}) == 1
        ended.append(texts[0].finish_reason)
    assert "stop" in ended
    assert sum(row.num_accepted for row in rows) > 50


def test_close_choices_are_made_again(
    systems: dict[str, rt.System], rows: list[DraftedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = dataclasses.replace(PRECISIONS["float32"], draft_margin=1e9)
    monkeypatch.setitem(PRECISIONS, "float32", wide)
    for question in QUESTIONS[:2]:
        plain, _, drafted = (s.run(question, max_new_tokens=30).answer for s in systems.values())
        assert drafted == plain
    assert sum(row.num_reread for row in rows) > 10
    assert sum(row.num_accepted for row in rows) == 0


def test_a_rotten_draft_costs_nothing_but_time(
    systems: dict[str, rt.System], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [systems["none"].run(question, max_new_tokens=30).answer for question in QUESTIONS]
    monkeypatch.setattr(
        "recmas_runtime.sequences.drafts.PromptLookup.draft", lambda self, most: (5,) * min(3, most)
    )
    assert [systems["long"].run(q, max_new_tokens=30).answer for q in QUESTIONS] == plain


def test_a_row_beside_others_leaves_its_draft(
    systems: dict[str, rt.System], rows: list[DraftedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    plain = SharedEngine.run_draft

    def counted(self: SharedEngine, call: Any) -> Any:
        ran.append(call.num_drafted)
        return plain(self, call)

    monkeypatch.setattr(SharedEngine, "run_draft", counted)
    # Of unequal length, so that one is left at the end of all.
    limits = (30, 14, 9)
    questions = list(QUESTIONS[: len(limits)])
    alone = [systems["none"].run(question, max_new_tokens=30).answer for question in questions]
    together = list(systems["long"].answer_all(questions, at_once=3, max_new_tokens=30))
    assert [a.answer for a in together if isinstance(a, rt.Answer)] == alone
    before = len(ran)
    single = list(systems["long"].answer_all(questions[:1], at_once=3, max_new_tokens=30))
    assert [a.answer for a in single if isinstance(a, rt.Answer)] == alone[:1]
    assert len(ran) > before, "by itself it runs what is drafted"
    assert len(rows) > 0


def test_a_batch_drafts_its_last_row(systems: dict[str, rt.System], rows: list[DraftedRow]) -> None:
    plain, _, drafted = (
        [a.answer for a in s.run(list(QUESTIONS), max_new_tokens=20)] for s in systems.values()
    )
    assert drafted == plain
    assert not any(row.num_drafted for row in rows), "rows of one length end together"


def test_sampled_text_is_not_drafted(systems: dict[str, rt.System], tmp_path: Path) -> None:
    given: tuple[Any, ...] = ({"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3})
    for place, settings in enumerate(given):
        plain = systems["none"].run(QUESTIONS[0], max_new_tokens=20, **settings)
        with rt.TraceWriter(tmp_path / str(place)) as trace:
            (drafted,) = systems["long"].run_batch(
                [QUESTIONS[0]], trace=trace, max_new_tokens=20, **settings
            )
        assert isinstance(drafted, rt.Answer)
        assert drafted.answer == plain.answer
        (line,) = (tmp_path / str(place) / "trace.jsonl").read_text().splitlines()
        assert "drafted_tokens" not in json.loads(line)["steps"][-1]


def test_traces_count_drafts(systems: dict[str, rt.System], tmp_path: Path) -> None:
    steps: dict[str, list[dict[str, Any]]] = {}
    for name in ("none", "long"):
        with rt.TraceWriter(tmp_path / name) as trace:
            systems[name].run_batch([QUESTIONS[0]], trace=trace, max_new_tokens=30)
        (line,) = (tmp_path / name / "trace.jsonl").read_text().splitlines()
        steps[name] = json.loads(line)["steps"]
    assert not any("drafted_tokens" in step for step in steps["none"])
    written = [step for step in steps["long"] if step["op"] in ("write", "decode")]
    assert len(written) == 2
    for step in written:
        assert step["drafted_tokens"] >= step["accepted_tokens"] > 0


def test_a_stream_that_is_left_frees_what_it_holds(systems: dict[str, rt.System]) -> None:
    pieces: Any = iter(systems["long"].stream(QUESTIONS[1], max_new_tokens=40))
    first = next(pieces)
    pieces.close()
    plain = systems["none"].run(QUESTIONS[1], max_new_tokens=40).answer
    assert plain.startswith(first)
    assert systems["long"].run(QUESTIONS[1], max_new_tokens=40).answer == plain


def test_drafts_are_built_into_bundles(built: Built) -> None:
    assert built.system.plan.speculation == SpeculationPlan(max_draft=5)
    assert built.program.system.speculation == built.system.plan.speculation
    records: list[dict[str, object]] = [{"question": QUESTIONS[0]}]
    assert [built.system.run(r).answer for r in records] == built.reference(records).texts


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (lambda t: t.replace("spec", "temperature: 0.5, spec"), "RM105", "temperature` is 0.5"),
        (
            lambda t: t.replace("spec", "repetition_penalty: 1.5, spec"),
            "RM105",
            "repetition_penalty: 1.5",
        ),
        (lambda t: t + "build: {precision: int8}\n", "RM121", "precision `int8`"),
        (lambda t: t.replace("max_draft: 5", "max_draft: 65"), "RM105", "at most 64"),
        (lambda t: t.replace("max_draft", "most_draft"), "RM103", "most_draft"),
    ],
)
def test_drafts_that_are_refused(
    edit: Callable[[str], str], code: str, message: str, tmp_path: Path
) -> None:
    from recmas_compiler.spec.spec import parse_spec

    text = """
recmas: 1
name: one
latent_steps: 0
backbones: {tiny: {source: llama}}
agents: {solver: {backbone: tiny, prompt: "{{ question }}"}}
answer: {agent: solver, speculation: {max_draft: 5}}
"""
    with pytest.raises(rt.RecmasError) as caught:
        parse_spec(edit(text), base_dir=tmp_path)
    problems = [p for p in caught.value.problems if p.code == code]
    assert any(message in problem.message for problem in problems), caught.value
