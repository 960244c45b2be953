"""Records of any lengths in one batch: the same answers as one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.specs import SPECS
from recmas_runtime.formats.plan import PrefillStep
from recmas_runtime.sequences.sequence_batch import ragged_window

QUESTIONS = st.lists(
    st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=120),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("spec", ["sequential", "mixture"])
def test_any_batch_equals_one_by_one(build_tiny: BuildTiny, spec: str) -> None:
    system = build_tiny(SPECS[spec]).system

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(QUESTIONS)
    def check(questions: list[str]) -> None:
        batch = system.run(questions)
        single = [system.run(question) for question in questions]
        assert [a.answer for a in batch] == [a.answer for a in single]
        assert [a.usage for a in batch] == [a.usage for a in single]
        assert [a.finish_reason for a in batch] == [a.finish_reason for a in single]

    check()


@given(st.data())
def test_a_window_holds_what_must_run_and_fits(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    kept = [data.draw(st.integers(0, length - 1)) for length in lengths]
    capacity = max(lengths) + data.draw(st.integers(0, 30))
    sequences = [
        np.arange(length, dtype=np.float32)[:, None] + 100 * row
        for row, length in enumerate(lengths)
    ]
    inputs, starts, last = ragged_window(sequences, kept, capacity)
    positions = inputs.shape[1]
    for row, length in enumerate(lengths):
        start = starts[row]
        assert 0 <= start <= kept[row]  # nothing that is not in the cache is skipped
        assert start + positions <= capacity  # nothing is written past the cache
        assert start + last[row] == length - 1  # the last real input is the sequence's end
        np.testing.assert_array_equal(
            inputs[row, : last[row] + 1], sequences[row][start : start + last[row] + 1]
        )
        assert not inputs[row, last[row] + 1 :].any()


def test_copied_rows_stay_where_texts_make_prompts_longer_than_the_cache(
    build_tiny: BuildTiny,
) -> None:
    """The second agent begins like the first, and its text is longer than there was room for."""
    system = build_tiny(SPECS["sequential"]).system.baseline("text")
    long = structs.replace(system.plan.sampling, max_new_tokens=150)
    question = "What is 7 * 8 and 9? " * 8  # a good part of the prompts, so that it is copied
    text = system.run(question, sampling=long)
    steps = tuple(
        structs.replace(step, prefix_from=None) if isinstance(step, PrefillStep) else step
        for step in system.plan.steps
    )
    apart = system.with_plan(structs.replace(system.plan, steps=steps))
    whole = apart.run(question, sampling=long)
    assert text.answer == whole.answer
    assert text.usage.handover_tokens == whole.usage.handover_tokens > 3 * 128
    assert text.usage.prompt_tokens < whole.usage.prompt_tokens


def test_a_record_that_cannot_run_does_not_lose_the_others(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["sequential"]).system
    asked = [
        rt.Record(id="good", fields={"question": "What?"}),
        rt.Record(id="long", fields={"question": "word " * 500}),
        rt.Record(id="empty", fields={}),
    ]
    good, long, empty = system.run_batch(asked)
    assert isinstance(good, rt.Answer)
    assert isinstance(long, rt.RecmasError)
    assert "RM501" in str(long)
    assert "384" in str(long)
    assert isinstance(empty, rt.RecmasError)
    assert "RM500" in str(empty)


def test_stream_adds_up_to_the_answer(build_tiny: BuildTiny) -> None:
    system = build_tiny(SPECS["mixture"]).system
    stream = system.stream("What is 7 * 8?")
    pieces = list(stream)
    assert stream.answer is not None
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.answer == system.run("What is 7 * 8?").answer
