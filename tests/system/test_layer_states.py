"""Backbones whose layers keep states: prompts go on from snapshots, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.specs import ANSWER, SPECS
from kit.traced import assert_messages_agree, run_traced
from kit.zoo import write_zoo_model
from naive_texts import NaiveTexts
from recmas_compiler.passes.prompt_prefix import HoistPromptPrefix, SharePromptPrefix
from recmas_runtime.engines.onnx.caches import Cache
from recmas_runtime.formats.plan import PrefillStep, StopPlan, ToolsPlan
from recmas_runtime.running.run_trace import RECORDS_NAME
from recmas_runtime.running.system import System
from recmas_runtime.sequences.sequence_batch import SequenceBatch
from test_tools_beside import OftenBox, hot, told

QUESTIONS = [
    "What is 7 * 8?",
    "Anna has three plans and an orange. Which of the plans is the best one, and why is it so?",
    "Hm?",
    "A train leaves at 9 and arrives at 11. How long does it take? Explain your reasoning.",
    "x",
]
RECORDS = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]

# Two run as a batch behind one who reads the same, and the one who sums up reads it too.
_AGENT = 'backbone: tiny, inner: {init: random}, system: "Each works in a way of its own."'
SHARED = f"""
recmas: 1
name: shared
rounds: 3
latent_steps: 3
backbones: {{tiny: {{source: state}}}}
agents:
  reader:
    {{{_AGENT}, prompt: {{
      first: "{{{{ question }}}} Read it.", then: "{{{{ question }}}} {{{{ latent.solver }}}}"}}}}
  math: {{{_AGENT}, prompt: "{{{{ question }}}} Count: {{{{ latent.reader }}}}"}}
  words: {{{_AGENT}, prompt: "{{{{ question }}}} Say it: {{{{ latent.reader }}}}"}}
  solver: {{{_AGENT}, prompt: "{{{{ question }}}} {{{{ latent.math }}}} {{{{ latent.words }}}}"}}
links:
  reader -> math: {{init: random}}
  reader -> words: {{init: random}}
  math -> solver: {{init: random}}
  words -> solver: {{init: random}}
  solver -> reader: {{init: random, feedback: true}}
{ANSWER}
"""

BuildWithStates = Callable[..., Built]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, families: Path) -> Path:
    """A folder with tiny backbones: `state` of gated DeltaNet, and one of attention alone."""
    root = tmp_path_factory.mktemp("with-states")
    write_zoo_model(root / "state", "qwen3_5_text")
    write_zoo_model(root / "rows", "qwen2")
    return root


@pytest.fixture
def build(build_tiny: BuildTiny, folder: Path) -> BuildWithStates:
    def make(spec: str, backbone: str = "state", **options: object) -> Built:
        text = SHARED if spec == "shared" else SPECS[spec]
        for other in ("llama", "state"):
            text = text.replace(f"source: {other}", f"source: {backbone}")
        return build_tiny(text, base_dir=folder, **options)

    return make


def prefilled(folder: Path) -> list[dict[tuple[str, int], int]]:
    """Return for each record the tokens that prompts ran, by agents and round."""
    lines = [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]
    return [
        {
            ("+".join(step["agents"]), step["round"]): step["prefilled_tokens"]
            for step in line["steps"]
            if step["op"] == "prefill"
        }
        for line in lines
    ]


BOTH = ["shared", pytest.param("sequential", marks=pytest.mark.families)]


@pytest.mark.parametrize("spec", BOTH)
def test_all_forms_agree(build: BuildWithStates, spec: str, tmp_path: Path) -> None:
    built = build(spec)
    steps = [step for step in built.system.plan.steps if isinstance(step, PrefillStep)]
    assert any(step.restore for step in steps if step.round > 1)
    assert any(step.prefix_from and step.restore for step in steps)
    together, messages = run_traced(built.system, tmp_path / "batch", RECORDS, batch=8)
    alone, others = run_traced(built.system, tmp_path / "alone", RECORDS, batch=1)
    naive = built.naive(RECORDS)
    assert_messages_agree(messages, naive)
    assert_messages_agree(others, naive)
    assert_messages_agree(messages, built.reference(RECORDS))
    assert [a.answer for a in together] == [a.answer for a in alone] == naive.texts
    assert len({a.answer for a in together}) > 1
    assert [a.usage for a in together] == [a.usage for a in alone]
    assert prefilled(tmp_path / "batch") == prefilled(tmp_path / "alone")
    without = build(spec, without=(HoistPromptPrefix, SharePromptPrefix))
    assert not without.system.plan.snapshots
    whole, their = run_traced(without.system, tmp_path / "whole", RECORDS, batch=8)
    assert [a.answer for a in whole] == naive.texts
    assert_messages_agree(their, naive)


@pytest.mark.parametrize("spec", ["sequential", "shared"])
def test_no_more_tokens_run_than_where_rows_are_kept(
    build: BuildWithStates, spec: str, tmp_path: Path
) -> None:
    system = build(spec).system
    run_traced(system, tmp_path / "state", RECORDS, batch=8)
    # Counts are those of the prompts alone; numbers are wrong where states are taken for rows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBatch, "keeps_states", False)
        run_traced(system, tmp_path / "rows", RECORDS, batch=8)
    found = prefilled(tmp_path / "state")
    assert found == prefilled(tmp_path / "rows")
    for record in found:
        by_round = [sum(n for (_, r), n in record.items() if r == round_) for round_ in (1, 2, 3)]
        assert by_round[0] > by_round[1] >= by_round[2]


@pytest.mark.families
@pytest.mark.parametrize("spec", ["sequential", "shared"])
def test_as_many_tokens_run_as_with_attention_alone(
    build: BuildWithStates, spec: str, tmp_path: Path
) -> None:
    run_traced(build(spec).system, tmp_path / "state", RECORDS, batch=8)
    run_traced(build(spec, "rows").system, tmp_path / "rows", RECORDS, batch=8)
    assert prefilled(tmp_path / "state") == prefilled(tmp_path / "rows")


def test_a_recursion_that_ends_early_goes_on_from_the_latest_states(
    build: BuildWithStates,
) -> None:
    built = build("sequential")
    plan = built.system.plan
    three = built.system.run(QUESTIONS)
    five = build_rounds(build, 5)
    stop = structs.replace(five.system.plan, stop_when=StopPlan(cosine=1e-9))
    early = System(stop, five.system.loaded).run(QUESTIONS)
    assert plan.rounds == 3
    assert [a.rounds for a in early] == [3] * len(QUESTIONS)
    assert [a.answer for a in early] == [a.answer for a in three]
    assert [a.usage for a in early] == [a.usage for a in three]


def build_rounds(build: BuildWithStates, rounds: int) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        more = SPECS["sequential"].replace("rounds: 3", f"rounds: {rounds}")
        patch.setitem(SPECS, "sequential", more)
        return build("sequential")


@pytest.mark.parametrize("spec", ["sequential", "shared"])
def test_text_baseline(build: BuildWithStates, folder: Path, spec: str) -> None:
    built = build(spec)
    system = built.system.baseline("text@9")
    records = [rt.Record(id=r["id"], fields=r, index=i) for i, r in enumerate(RECORDS)]
    together = system.run_batch(records)
    for record, answer in zip(records, together, strict=True):
        assert isinstance(answer, rt.Answer), answer
        naive = NaiveTexts(built.topology, folder)
        expected = naive.loop(record.fields, cap=9, answer_cap=12)
        assert answer.answer == expected
        (alone,) = system.run_batch([record])
        assert isinstance(alone, rt.Answer)
        assert (alone.answer, alone.usage) == (answer.answer, answer.usage)
    whole = system.with_plan(without_snapshots(system))
    others = whole.run_batch(records)
    assert [a.answer for a in others] == [a.answer for a in together]  # type: ignore[union-attr]
    spared = [
        b.usage.prompt_tokens - a.usage.prompt_tokens  # type: ignore[union-attr]
        for a, b in zip(together, others, strict=True)
    ]
    assert min(spared) > 0


def without_snapshots(system: rt.System) -> rt.Plan:
    """Return a plan in which every prompt runs whole."""
    steps = tuple(
        structs.replace(step, restore=None, snapshots=()) if isinstance(step, PrefillStep) else step
        for step in system.plan.steps
    )
    return structs.replace(system.plan, steps=steps, snapshots={})


@pytest.mark.parametrize("name", ["moa@9", "single", "shuffled", "null"])
def test_other_baselines_do_not_depend_on_snapshots(build: BuildWithStates, name: str) -> None:
    system = build("shared").system.baseline(name)
    whole = build("shared", without=(HoistPromptPrefix, SharePromptPrefix)).system.baseline(name)
    if name.startswith("moa"):  # its plan reuses prompts whatever the system's does
        assert system.plan.snapshots
        whole = system.with_plan(without_snapshots(system))
    found, expected = system.run(QUESTIONS[:4]), whole.run(QUESTIONS[:4])
    assert [a.answer for a in found] == [a.answer for a in expected]
    spared = [
        b.usage.prompt_tokens - a.usage.prompt_tokens for a, b in zip(found, expected, strict=True)
    ]
    assert (min(spared) > 0) == (name in ("moa@9", "shuffled"))


def test_candidates_are_read_behind_states_one_after_the_other(build: BuildWithStates) -> None:
    """What one of them leaves in a state is gone before the next is read."""
    system = build("shared").system
    texts = ["an orange", "x", "three plans", "an orange tree"]
    (together,) = system.score_batch(QUESTIONS[:1], [texts])
    alone = [system.score_batch(QUESTIONS[:1], [[text]])[0] for text in texts]
    assert together.losses == tuple(one.losses[0] for one in alone)
    assert len(set(together.losses)) == len(texts)
    # The answer itself is written behind the prompt alone.
    assert together.losses[0] < together.losses[3]


def test_results_of_tools_are_read_behind_states(build: BuildWithStates) -> None:
    """Rows that call a tool read more than those beside them, and others end: all as if alone."""
    built = build("shared")
    plan = ToolsPlan(functions=("lookup",), max_calls=6)
    box = OftenBox(plan, corpus=None, functions={"lookup": lambda text: f"found {text}"})
    system = System(built.system.plan, built.system.loaded, box)
    random = hot(system)
    together = [told(answer) for answer in system.run(QUESTIONS, sampling=random)]
    assert sum(answer[-1] for answer in together) > 5
    records = [rt.Record(id=q, fields={"question": q}, index=i) for i, q in enumerate(QUESTIONS)]
    alone = [told(system.run_batch([record], sampling=random)[0]) for record in records]
    assert together == alone


def test_a_batch_that_runs_out_of_memory_is_halved(build: BuildWithStates) -> None:
    system = build("shared").system
    expected = system.run(QUESTIONS)
    whole = Cache.save_states

    def short_of_memory(self: Cache) -> object:
        if self.rows > 2:
            raise MemoryError
        return whole(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "save_states", short_of_memory)
        found = system.run(QUESTIONS)
    assert [a.answer for a in found] == [a.answer for a in expected]
    assert max(a.batch_size for a in found) < max(a.batch_size for a in expected)
