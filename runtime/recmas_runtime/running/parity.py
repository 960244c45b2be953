"""Engines against the reference on a stored case: what is measured at build and on `verify`.

Every call is teacher-forced, so differences do not feed back. Shape legend: T positions of the
case, N calls it is cut into, K tokens of the greedy continuation, d width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.interface import Backbone, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.engines.onnx.session import Device, call_onnx, make_session
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.manifest import PARITY_ROWS
from recmas_runtime.formats.plan import cache_capacity

Case = Mapping[str, NDArray[Any]]


# The tensors of a backbone's case.
BACKBONE_CASE: Final = frozenset(
    {
        "inputs_embeds",
        "chunks",
        "hidden",
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

    A case has `inputs_embeds` [1, T, d]; `chunks` [N], lengths of the calls that T is cut into;
    expected `hidden` [1, T, d] and `thought_next` [N, 1, d]; `logits_hidden` [n, d] with expected
    `logits` [n, V]; `greedy_prompt` [P] with expected `greedy_tokens` [K]. The calls have a second,
    shorter row with a part of the same positions.
    """
    grouped = stack_operands([inner])
    hidden, lagging, following = _run_chunks(engine, case["inputs_embeds"], case["chunks"], grouped)
    logits = engine.logits(case["logits_hidden"])
    # A case's inputs begin with the embedded tokens of its greedy prompt.
    embeds = engine.embed(case["greedy_prompt"][None])
    figures = {
        "hidden_relative": max(
            relative_difference(hidden, case["hidden"]),
            relative_difference(lagging, case["hidden"][:, : lagging.shape[1]]),
            relative_difference(following, case["thought_next"]),
        ),
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


def measure_probe(path: Path, *, threads: int | None = None, device: Device = "cpu") -> float:
    """Return how far the known-answer probe is from its answer, largest absolute difference."""
    session = make_session(path, threads=threads, device=device)
    output, expected = call_onnx(session.run, ["output", "expected"], {})
    return _difference(np.asarray(output), np.asarray(expected))


def relative_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max |found - expected| / max |expected|; infinite for what is not a number."""
    difference, scale = _difference(found, expected), _largest(expected)
    return difference / scale if scale > 0 else difference


def _difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return max |found - expected|; infinite for shapes that are not the same."""
    return _largest(found - expected) if found.shape == expected.shape else math.inf


def _largest(array: NDArray[Any]) -> float:
    largest = float(np.abs(array).max(initial=0.0))
    return math.inf if np.isnan(largest) else largest


def _run_chunks(
    engine: Backbone[Any], embeds: NDArray[Any], chunks: NDArray[Any], inner: Operands
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return hidden states [1, T, d] and, for each call, the inner link's output [N, 1, d].

    The second hidden states [1, U, d] are those of another row of the same calls: the case's first
    U positions, of which its first call has only half, so that it lags behind in all the others.
    Two rows can go wrong where one does not: in what fills up the shorter one, and where each
    writes.
    """
    cache = engine.new_cache(PARITY_ROWS, cache_capacity(embeds.shape[1]))
    lengths = np.stack([chunks, chunks])
    lengths[1, 0] = max(1, int(chunks[0]) // 2)
    hidden: tuple[list[NDArray[Any]], ...] = ([], [])
    following = []
    starts = np.zeros(PARITY_ROWS, np.int64)
    for lengths_B in lengths.T:
        part = np.zeros((PARITY_ROWS, int(lengths_B.max()), embeds.shape[2]), np.float32)
        for row, (start, length) in enumerate(zip(starts, lengths_B, strict=True)):
            part[row, :length] = embeds[0, start : start + length]
        states, _, next_embeds = engine.forward(cache, part, starts, lengths_B - 1, inner)
        for row, length in enumerate(lengths_B):
            hidden[row].append(states[row : row + 1, :length].copy())
        following.append(next_embeds[0].copy())
        starts = starts + lengths_B
    first, second = (np.concatenate(parts, axis=1) for parts in hidden)
    return first, second, np.stack(following)


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
