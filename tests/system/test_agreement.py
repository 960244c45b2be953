"""A bundle, the reference and the naive form give the same messages and the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt
from kit.bundles import BuildTiny, Built
from kit.specs import SPECS
from kit.traced import assert_messages_agree, run_traced
from recmas_compiler.ir.ops import Prefill, Think
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.passes.batch_parallel_agents import BatchParallelAgents
from recmas_compiler.passes.fuse_links import FuseLinks
from recmas_compiler.passes.prompt_prefix import HoistPromptPrefix, SharePromptPrefix
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_compiler.passes.share_backbones import ShareBackbones
from recmas_runtime.formats.precisions import TOLERANCES

QUESTIONS = [
    "What is 7 * 8?",
    "Anna has three plans and an orange. Which of the plans is the best one, and why is it so?",
    "Hm?",
    "A train leaves at 9 and arrives at 11. How long does it take? Explain your reasoning.",
    "x",
]
RECORDS = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]


def run(system: rt.System, folder: Path, *, batch: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Answer in batches; returns texts and messages [records, m, d]."""
    answers, messages = run_traced(system, folder, RECORDS, batch=batch)
    return [answer.answer for answer in answers], messages


@pytest.fixture(params=SPECS)
def built(request: pytest.FixtureRequest, build_tiny: BuildTiny) -> Built:
    return build_tiny(SPECS[request.param])


def test_bundle_agrees_with_reference_and_naive_form(built: Built, tmp_path: Path) -> None:
    texts, messages = run(built.system, tmp_path, batch=1)
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    assert messages
    assert set(messages) == set(reference.messages)
    assert_messages_agree(messages, reference)
    assert_messages_agree(messages, naive)
    assert texts == reference.texts
    assert texts == naive.texts
    assert len(set(texts)) > 1, "texts that are all equal prove nothing"


def test_ragged_batch_equals_one_by_one(built: Built, tmp_path: Path) -> None:
    single, messages = run(built.system, tmp_path / "one", batch=1)
    ragged, ragged_messages = run(built.system, tmp_path / "many", batch=len(RECORDS))
    assert ragged == single
    for name, message in messages.items():
        np.testing.assert_allclose(
            ragged_messages[name], message, rtol=0, atol=TOLERANCES["message_absolute"]
        )


@pytest.mark.parametrize("spec", ["sequential", "mixture"])
@pytest.mark.parametrize(
    "left_out",
    [
        BatchParallelAgents,
        FuseLinks,
        HoistPromptPrefix,
        RemoveDeadSteps,
        ShareBackbones,
        SharePromptPrefix,
    ],
)
def test_a_pass_left_out_changes_no_answer(
    build_tiny: BuildTiny, spec: str, left_out: type, tmp_path: Path
) -> None:
    texts, messages = run(build_tiny(SPECS[spec]).system, tmp_path / "all", batch=3)
    other = build_tiny(SPECS[spec], without=(left_out,))
    assert left_out.__name__ not in print_graph(other.program)
    other_texts, other_messages = run(other.system, tmp_path / "fewer", batch=3)
    assert other_texts == texts
    for name, message in messages.items():
        np.testing.assert_allclose(
            other_messages[name], message, rtol=0, atol=TOLERANCES["message_absolute"]
        )


def test_prompts_that_begin_alike_run_once(build_tiny: BuildTiny) -> None:
    """Fewer tokens run for long questions, as many for short ones, in any batch."""

    def prompt_tokens(built: Built, batch: int) -> list[int]:
        records = [rt.Record(id=r["id"], fields=r, index=i) for i, r in enumerate(RECORDS)]
        found: list[int] = []
        for start in range(0, len(records), batch):
            for answer in built.system.run_batch(records[start : start + batch]):
                assert isinstance(answer, rt.Answer)
                found.append(answer.usage.prompt_tokens)
        return found

    shared = build_tiny(SPECS["sequential"])
    apart = build_tiny(SPECS["sequential"], without=(SharePromptPrefix,))
    copied = np.subtract(prompt_tokens(apart, 1), prompt_tokens(shared, 1))
    # The planner has a system text of its own; the solver copies the question from the critic.
    long = np.array([len(question) > 60 for question in QUESTIONS])
    assert (copied[long] >= 30).all()
    assert prompt_tokens(shared, len(RECORDS)) == prompt_tokens(shared, 1)


def test_mixture_runs_its_specialists_as_one_batch(build_tiny: BuildTiny) -> None:
    program = build_tiny(SPECS["mixture"]).program
    agents = {op.agents for op in program.nodes().values() if isinstance(op, Prefill | Think)}
    assert max(map(len, agents)) >= 2, agents
