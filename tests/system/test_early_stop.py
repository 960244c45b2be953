"""Recursions that end early: the engines do what the meaning says, whatever shares their batch."""

from __future__ import annotations

import re

import numpy as np
import pytest
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.specs import SPECS
from recmas_runtime.formats.plan import StopPlan
from recmas_runtime.running.system import System
from recmas_runtime.sequences.messages import mean_cosine

QUESTIONS = ["What is 7 * 8?", "Name a colour, please.", "A", "Why do cats sleep all day long?"]
ROUNDS = 5


def system_with(build_tiny: BuildTiny, spec: str, cosine: float | None) -> System:
    """Return a system of five rounds that may stop early."""
    system = build_tiny(with_rounds(spec, ROUNDS)).system
    stop = None if cosine is None else StopPlan(cosine=cosine)
    return System(structs.replace(system.plan, stop_when=stop), system.loaded)


def with_rounds(spec: str, rounds: int) -> str:
    return re.sub("^rounds: .*$", f"rounds: {rounds}", SPECS[spec], flags=re.MULTILINE)


@pytest.mark.parametrize("spec", ["sequential", "mixture"])
def test_a_low_bar_ends_after_two_rounds_and_answers_as_three_would(
    build_tiny: BuildTiny, spec: str
) -> None:
    early = system_with(build_tiny, spec, 1e-9).run(QUESTIONS)
    three = build_tiny(with_rounds(spec, 3)).system.run(QUESTIONS)
    assert [a.rounds for a in early] == [3] * len(QUESTIONS)
    assert [a.answer for a in early] == [a.answer for a in three]
    assert [a.usage for a in early] == [a.usage for a in three]


@pytest.mark.parametrize("spec", ["sequential", "mixture"])
def test_a_bar_out_of_reach_changes_nothing(build_tiny: BuildTiny, spec: str) -> None:
    never = system_with(build_tiny, spec, 2.0).run(QUESTIONS)
    always = system_with(build_tiny, spec, None).run(QUESTIONS)
    assert [(a.rounds, a.answer) for a in never] == [(ROUNDS, a.answer) for a in always]


def test_records_of_a_batch_end_each_in_their_own_round(build_tiny: BuildTiny) -> None:
    # A bar between the records' cosines, so that some are settled and some are not.
    found = [settled_at(build_tiny, question) for question in QUESTIONS]
    bar = float(np.median(found))
    system = system_with(build_tiny, "sequential", bar)
    together = system.run(QUESTIONS)
    alone = [system.run(question) for question in QUESTIONS]
    assert len({a.rounds for a in together}) > 1
    assert [a.rounds for a in together] == [a.rounds for a in alone]
    assert [a.answer for a in together] == [a.answer for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]


def settled_at(build_tiny: BuildTiny, question: str) -> float:
    """Return the least cosine between the messages of rounds 1 and 2."""
    messages: dict[str, np.ndarray] = {}

    class Listener:
        def add_batch(self, records: object, events: object, found: list[dict]) -> None:
            messages.update({name: message[None] for name, message in found[0].items()})

    system = system_with(build_tiny, "sequential", None)
    record = rt.Record(id="1", fields={"question": question})
    system.run_batch([record], trace=Listener())
    links = {name.split("@")[0] for name in messages if name.endswith("@2")}
    links &= {name.split("@")[0] for name in messages if name.endswith("@1")}
    return min(
        float(mean_cosine(messages[f"{link}@2"], messages[f"{link}@1"])[0]) for link in links
    )
