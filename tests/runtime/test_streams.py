"""Streams: read once, and in nobody's way."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

import recmas_runtime as rt

# Hot, so that every token of a text depends on all before it.
HOT = rt.SamplingPlan(temperature=3.0, max_new_tokens=12)


@pytest.fixture
def system(hand_bundle: Path) -> rt.System:
    return rt.load(hand_bundle)


def test_a_reader_may_run_the_system_between_pieces(system: rt.System) -> None:
    alone = [system.run(question, sampling=HOT) for question in ("1", "22")]
    streams = [system.stream(question, sampling=HOT) for question in ("1", "22")]
    texts = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert system.run("7").answer == "h"
    assert texts == [answer.answer for answer in alone]
    assert [stream.answer.usage for stream in streams if stream.answer] == [
        answer.usage for answer in alone
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_is_read_once(system: rt.System, whole: bool) -> None:
    stream = system.stream("1", sampling=HOT)
    for _ in stream:
        if not whole:
            break
    kept = stream.answer
    assert (kept is not None) is whole
    with pytest.raises(rt.RecmasError, match="RM512"):
        list(stream)
    assert stream.answer is kept


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_that_is_kept_holds_no_caches(system: rt.System, whole: bool) -> None:
    stream = system.stream("1", sampling=HOT)
    assert stream._batch is not None
    execution = stream._batch._execution
    pieces: Iterator[str] = iter(stream)
    next(pieces)
    sequence_batches = [weakref.ref(sequences) for sequences in execution._sequences.values()]
    del execution
    assert any(sequences() is not None for sequences in sequence_batches)
    if whole:
        list(pieces)
    else:
        del pieces
    gc.collect()
    assert all(sequences() is None for sequences in sequence_batches)
