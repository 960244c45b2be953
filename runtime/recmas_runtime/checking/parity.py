"""Engines against the reference on a stored case: what is measured at build and on `verify`.

Every call is teacher-forced, so differences do not feed back. Shape legend: R rows, T positions of
the first round, U of the feedback round behind what is kept of the first, N and M calls that they
are cut into, K tokens of the greedy continuation, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.interface import Backbone, HandedRows, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.engines.onnx.probe import difference, largest
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.manifest import PARITY_ROWS
from recmas_runtime.formats.plan import cache_capacity

Case = Mapping[str, NDArray[Any]]


# The tensors of a backbone's case.
BACKBONE_CASE: Final = frozenset(
    {
        "inputs_embeds",
        "lengths",
        "hidden",
        "feedback_embeds",
        "feedback_lengths",
        "feedback_hidden",
        "thought_next",
        "greedy_prompt",
        "greedy_tokens",
        "logits",
        "logits_hidden",
    }
)


class Parity(NamedTuple):
    """Largest differences, by the names of `TOLERANCES`, and whether the greedy texts are equal."""

    figures: dict[str, float]
    greedy_tokens_equal: bool


def measure_backbone_parity(engine: Backbone[Any], case: Case, inner: Operands) -> Parity:
    """Run a backbone's engines over a case and its inner link, operands without the G axis.

    A case has two rounds, as an agent with feedback has. The first is `inputs_embeds` [1, T, d], of
    which the second row has a beginning only; `lengths` [N, R] are those of its calls in each row.
    Then both rows go back to where their first call ended, the beginning that is kept, and go on
    with `feedback_embeds` [1, U, d] in calls of `feedback_lengths` [M, R]. Two rows can go wrong
    where one does not: in what fills up the shorter one, and where each writes; and a second round
    where the first does not: in what it reads of kept rows, and of those that it overwrites.

    Where rows can be hidden from layers, the second round is run once more behind rows that are
    (`hidden_groups`), and `masked_hidden` [R, U, d] is expected.

    Expected are `hidden` [1, T, d], `feedback_hidden` [R, U, d] and, at the end of each call, the
    inner link's `thought_next` [N + M, R, d]; for `logits_hidden` [n, d] `logits` [n, V]; for
    `greedy_prompt` [P] `greedy_tokens` [K].
    """
    grouped = stack_operands([inner])
    logits = engine.logits(case["logits_hidden"])
    # A case's inputs begin with the embedded tokens of its greedy prompt.
    embeds = engine.embed(case["greedy_prompt"][None])
    figures = {
        "hidden_relative": _rounds_difference(engine, case, grouped),
        "logits_relative": relative_difference(logits, case["logits"]),
        "embeds_relative": relative_difference(embeds, case["inputs_embeds"][:, : embeds.shape[1]]),
    }
    expected = case["greedy_tokens"].tolist()
    found = _continue_greedily(engine, case["greedy_prompt"], len(expected), grouped)
    return Parity(figures, found == expected)


def measure_link_parity(engine: LinkEngine, case: Case, links: Mapping[str, Operands]) -> float:
    """Return the largest relative difference over the links of a case, operands without the G axis.

    A case has `link.ID.x` [N, d_in] and expected `link.ID.y` [N, d_out] for any links.
    """
    return max(
        (
            relative_difference(
                engine.apply(case[f"link.{link}.x"][None], stack_operands([links[link]]))[0],
                case[f"link.{link}.y"],
            )
            for link in case_links(case)
        ),
        default=0.0,
    )


def case_links(case: Case) -> tuple[str, ...]:
    """Return the ids of the links that a case has vectors for."""
    return tuple(name[len("link.") : -len(".x")] for name in case if name.endswith(".x"))


def relative_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max |found - expected| / max |expected|; infinite for what is not a number."""
    off, scale = difference(found, expected), largest(expected)
    return off / scale if scale > 0 else off


def case_positions(case: Case) -> int:
    """Return how many positions of a cache a case writes, with those that fill up shorter rows."""
    longest = len(case["greedy_prompt"]) + len(case["greedy_tokens"])
    starts = np.zeros(PARITY_ROWS, np.int64)
    for lengths in (case["lengths"], case["feedback_lengths"]):
        for lengths_R in lengths:
            longest = max(longest, int(starts.max() + lengths_R.max()))
            starts = starts + lengths_R
        starts = case["lengths"][0]
    return longest


def _rounds_difference(engine: Backbone[Any], case: Case, inner: Operands) -> float:
    """Run both rounds of a case; return the largest difference of any row of any call."""
    cache = engine.new_cache(PARITY_ROWS, cache_capacity(case_positions(case)))
    lengths, embeds_Td = case["lengths"], case["inputs_embeds"][0]
    nothing, kept = np.zeros(PARITY_ROWS, np.int64), lengths[0]

    def run(rows: Sequence[NDArray[Any]], lengths_NR: NDArray[Any], starts: NDArray[Any]) -> _Ran:
        return _run_calls(engine, cache, rows, lengths_NR, starts, inner)

    beginning = run([embeds_Td] * PARITY_ROWS, lengths[:1], nothing)
    # Of keys and values, forgetting is a smaller write index; states cannot be cut back.
    states = cache.save_states() if has_states(engine.entry.layers) else None
    rest = run([embeds_Td[k:] for k in kept], lengths[1:], kept)
    if states is not None:
        cache.restore_states(states, {row: row for row in range(PARITY_ROWS)})
    again = run([case["feedback_embeds"][0]] * PARITY_ROWS, case["feedback_lengths"], kept)
    thought_next = np.concatenate([beginning.thought_next, rest.thought_next, again.thought_next])
    pairs = [(thought_next, case["thought_next"])]
    for row in range(PARITY_ROWS):
        found = np.concatenate([beginning.hidden[row], rest.hidden[row]])
        pairs.append((found, case["hidden"][0, : len(found)]))
        pairs.append((again.hidden[row], case["feedback_hidden"][row, : len(again.hidden[row])]))
    if engine.entry.masked_layers:
        for row, groups in enumerate(hidden_groups(engine.entry.masked_layers)):
            hidden = {layer for group in groups for layer in group}
            seen_by = set(range(engine.entry.num_layers)) - hidden
            cache.hide_rows(row, [HandedRows(0, int(kept[row]), seen_by)])
        behind = run([case["feedback_embeds"][0]] * PARITY_ROWS, case["feedback_lengths"], kept)
        pairs += [
            (states, expected[: len(states)])
            for states, expected in zip(behind.hidden, case["masked_hidden"], strict=True)
        ]
    return max(relative_difference(found, expected) for found, expected in pairs)


def hidden_groups(masked_layers: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    """Return for each row of a case the groups of layers that do not see what it keeps.

    In the first row these are all groups, in the second the last one alone.
    """
    return [masked_layers, masked_layers[-1:]]


class _Ran(NamedTuple):
    """What calls gave: hidden states [n, d] of each row, inner link's outputs [N, R, d]."""

    hidden: list[NDArray[Any]]
    thought_next: NDArray[Any]


def _run_calls(
    engine: Backbone[Any],
    cache: Any,
    rows: Sequence[NDArray[Any]],
    lengths_NR: NDArray[Any],
    starts_R: NDArray[Any],
    inner: Operands,
) -> _Ran:
    """Run what comes next in each row [T, d], cut into calls, from a position of each row on.

    What fills up the shorter row of a call is zeros, as in a run.
    """
    ends_NR = np.cumsum(lengths_NR, axis=0)
    num_rows, width = len(rows), rows[0].shape[1]
    hidden = [np.zeros((int(end), width), np.float32) for end in lengths_NR.sum(axis=0)]
    following = np.zeros((len(lengths_NR), num_rows, width), np.float32)
    for call, (lengths_R, ends_R) in enumerate(zip(lengths_NR, ends_NR, strict=True)):
        begins_R = ends_R - lengths_R
        part = np.zeros((num_rows, int(lengths_R.max()), width), np.float32)
        for row, (begin, end) in enumerate(zip(begins_R, ends_R, strict=True)):
            part[row, : end - begin] = rows[row][begin:end]
        states, _, next_embeds = engine.forward(
            cache, part, starts_R + begins_R, lengths_R - 1, inner
        )
        for row, (begin, end) in enumerate(zip(begins_R, ends_R, strict=True)):
            hidden[row][begin:end] = states[row, : end - begin]
        following[call] = next_embeds[:, 0]
    return _Ran(hidden, following)


def _continue_greedily(
    engine: Backbone[Any], prompt: NDArray[Any], num_tokens: int, inner: Operands
) -> list[int]:
    cache = engine.new_cache(1, cache_capacity(len(prompt) + num_tokens))
    tokens: list[int] = []
    ids, start = prompt, 0
    for _ in range(num_tokens):
        embeds = engine.embed(ids[None])
        last = np.array([len(ids) - 1])
        _, thought, _ = engine.forward(cache, embeds, np.array([start]), last, inner)
        start += len(ids)
        ids = engine.logits(np.ascontiguousarray(thought[:, 0])).argmax(axis=1)
        tokens += ids.tolist()
    return tokens
