"""Rows at other positions: turned as complex numbers are, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest

from recmas_runtime.formats.layers import Rotation, RowPositions
from recmas_runtime.formats.messages import THOUGHTS, MessageForm, RowsOf, moved_links
from recmas_runtime.sequences.moved_keys import FloatArray, moved_keys

# Width 10, of which numbers 2 to 7 turn; which make a pair.
PAIRS = {"halves": [(2, 5), (3, 6), (4, 7)], "pairs": [(2, 3), (4, 5), (6, 7)]}
INV_FREQ = (1.0, 0.31, -2.5e-4)


def rotation(layout: str) -> Rotation:
    return Rotation(layout="halves" if layout == "halves" else "pairs", start=2, inv_freq=INV_FREQ)


def rows(seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(2, 3, 5, 10)).astype(np.float32)


@pytest.mark.parametrize("offset", [1, 36, -7, 100_000])
@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_turn_as_complex_numbers_do(layout: str, offset: int) -> None:
    keys = rows()
    expected = keys.astype(np.float64)
    for (one, other), frequency in zip(PAIRS[layout], INV_FREQ, strict=True):
        turned = (keys[..., one] + 1j * keys[..., other]) * np.exp(1j * offset * frequency)
        expected[..., one], expected[..., other] = turned.real, turned.imag
    moved = moved_keys(keys, rotation(layout), offset)
    assert moved.dtype == np.float32
    assert np.abs(moved - expected).max() < 1e-6
    assert np.array_equal(keys, rows()), "the rows that were given are left as they were"


@pytest.mark.parametrize("layout", PAIRS)
def test_there_and_back_is_where_it_was(layout: str) -> None:
    keys, form = rows(), rotation(layout)
    once = moved_keys(moved_keys(keys, form, 900), form, -300)
    assert np.abs(once - moved_keys(keys, form, 600)).max() < 1e-6
    assert np.abs(moved_keys(once, form, -600) - keys).max() < 1e-6


def test_rows_without_a_position_stay() -> None:
    positions = RowPositions(rotations=(rotation("pairs"),), tensors={"key.1": 0})
    assert positions.of_tensor("key.0") is None
    assert positions.of_tensor("value.1") is None
    assert positions.of_tensor("key.1") == rotation("pairs")
    keys = rows()
    assert np.array_equal(moved_keys(keys, None, 5), keys)
    assert np.array_equal(moved_keys(keys, rotation("pairs"), 0), keys)


def cache(*of: RowsOf) -> MessageForm:
    return MessageForm(carries="cache", rows=of)


CONTEXT = cache("context")

# name -> (links, those of them whose rows may land elsewhere)
LINKS: dict[str, tuple[dict[str, MessageForm], set[str]]] = {
    "the beginning of one sender": ({"a->c": CONTEXT, "b->c": THOUGHTS}, set()),
    "one sender and two receivers": ({"a->b": CONTEXT, "a->c": CONTEXT}, set()),
    "two senders": ({"a->c": CONTEXT, "b->c": CONTEXT}, {"a->c", "b->c"}),
    "a sender that takes rows itself": ({"a->b": CONTEXT, "b->c": CONTEXT}, {"b->c"}),
    "in a ring": ({"a->b": CONTEXT, "b->a": CONTEXT}, {"a->b", "b->a"}),
    "a sender that takes vectors": ({"a->b": THOUGHTS, "b->c": CONTEXT}, set()),
    "thoughts, which lie behind the prompt": ({"a->c": cache("thoughts")}, {"a->c"}),
    "a whole turn": ({"a->c": cache("prompt", "thoughts")}, set()),
    "whole turns of two": (
        {"a->c": cache("prompt"), "b->c": cache("prompt", "written")},
        {"a->c", "b->c"},
    ),
    "text behind the generation prompt": ({"a->c": cache("context", "written")}, {"a->c"}),
}


@pytest.mark.parametrize("name", LINKS)
def test_rows_move_where_they_land_elsewhere(name: str) -> None:
    links, expected = LINKS[name]
    found = moved_links((link[0], link[-1], form) for link, form in links.items())
    assert {f"{source}->{target}" for source, target in found} == expected
