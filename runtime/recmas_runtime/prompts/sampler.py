"""Choosing tokens from logits, and noticing where an answer ends.

Settings apply in the order of Hugging Face's `generate`: repetition penalty, temperature, top-k,
top-p, min-p. Shape legend: R rows of a call, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TypedDict

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.formats.plan import (
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    Plan,
    SamplingPlan,
)

Floats = NDArray[np.float32]
Scores = NDArray[np.float64]
Indices = NDArray[np.int64]


class SamplingSettings(TypedDict, total=False):
    """Settings of `SamplingPlan`, some of them."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]


def check_sampling(sampling: SamplingPlan) -> None:
    """Refuse settings that mean nothing, those of another type included.

    Raises:
        RecmasError: RM505, one problem for each.
    """
    # A caller of the Python API may give anything, and a text is a sequence of texts.
    stop: object = sampling.stop
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str)
    bounds = {
        "max_new_tokens": (
            _is(Integral, sampling.max_new_tokens)
            and 1 <= sampling.max_new_tokens <= MAX_NEW_TOKENS,
            f"a whole number from 1 to {MAX_NEW_TOKENS}",
        ),
        "temperature": (
            _is(Real, sampling.temperature) and 0.0 <= sampling.temperature <= MAX_TEMPERATURE,
            f"a number from 0 (greedy) to {MAX_TEMPERATURE:g}",
        ),
        "top_p": (
            _is(Real, sampling.top_p) and 0.0 < sampling.top_p <= 1.0,
            "a number above 0 and at most 1",
        ),
        "top_k": (
            _is(Integral, sampling.top_k) and 0 <= sampling.top_k <= MAX_TOP_K,
            f"a whole number from 0 (all) to {MAX_TOP_K}",
        ),
        "min_p": (
            _is(Real, sampling.min_p) and 0.0 <= sampling.min_p <= 1.0,
            "a number between 0 and 1",
        ),
        "repetition_penalty": (
            _is(Real, sampling.repetition_penalty)
            and 0.0 < sampling.repetition_penalty <= MAX_REPETITION_PENALTY,
            f"a number above 0 and at most {MAX_REPETITION_PENALTY:g}",
        ),
        "seed": (
            _is(Integral, sampling.seed) and 0 <= sampling.seed <= MAX_SEED,
            f"a whole number from 0 to {MAX_SEED}",
        ),
        "stop": (
            is_list
            and len(sampling.stop) <= MAX_STOPS
            and all(isinstance(text, str) and text for text in sampling.stop),
            f"a list of at most {MAX_STOPS} strings that are not empty",
        ),
    }
    problems = [
        Problem(
            code="RM505",
            message=f"{name} is {getattr(sampling, name)!r}",
            hint=f"It must be {wanted}.",
        )
        for name, (ok, wanted) in bounds.items()
        if not ok
    ]
    if problems:
        raise RecmasError(problems)


def chosen_sampling(
    plan: Plan, max_positions: int, sampling: SamplingPlan | None, over: SamplingSettings
) -> SamplingPlan:
    """Return the settings of a run: a plan's or others in their place, and single ones over those.

    Args:
        max_positions: Of the answer agent's backbone.

    Raises:
        RecmasError: RM505 for settings that mean nothing or that there is no room for.
    """
    settings = plan.sampling if sampling is None else sampling
    if not isinstance(settings, SamplingPlan):
        kind = type(settings).__name__
        hint = "Give a SamplingPlan, or single settings by their names."
        raise fail("RM505", f"sampling is of the type {kind}", hint=hint)
    settings = structs.replace(settings, **over)
    check_sampling(settings)
    room = max_positions - plan.limits.max_prompt_tokens
    if settings.max_new_tokens > max(room, plan.sampling.max_new_tokens):
        backbone = plan.agents[plan.answer_agent].backbone
        raise fail(
            "RM505",
            f"max_new_tokens is {settings.max_new_tokens}",
            hint=f"After the longest prompt, backbone {backbone!r} has room for {room}.",
        )
    return settings


def is_greedy(sampling: SamplingPlan) -> bool:
    """Return whether each token is that of the largest logit, whatever was written before."""
    return sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0


def _is(kind: type, value: object) -> bool:
    """Return whether a setting is a number of a kind, which truth values are not here."""
    return isinstance(value, kind) and not isinstance(value, bool)


class Sampler:
    """Chooses the next token of every sample of a batch.

    Each sample has its own random stream, so what it draws does not depend on its neighbours.

    Raises:
        RecmasError: RM505 for settings that mean nothing.
    """

    def __init__(self, sampling: SamplingPlan, seeds: Sequence[int]) -> None:
        check_sampling(sampling)
        self._sampling = sampling
        self._is_greedy = is_greedy(sampling)
        self._streams = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        self._written: list[set[int]] = [set() for _ in seeds]

    def choose(self, logits: Floats, rows: Sequence[int] | None = None) -> Indices:
        """Choose one token per row, [R]; the lowest id wins a tie of greedy choice.

        `rows` are the samples that the rows belong to: all in order if None.

        Raises:
            RecmasError: RM507 if logits are not numbers.
        """
        assert logits.ndim == 2, f"logits {logits.shape} are not [R, V]"
        samples = range(len(logits)) if rows is None else rows
        # The largest; of a row with a NaN, that.
        largest = logits.argmax(axis=1)
        if not np.isfinite(logits[np.arange(len(logits)), largest]).all():
            raise fail(
                "RM507",
                "the engine returned logits that are not finite",
                hint="Run `recmas verify` on the bundle.",
            )
        if self._is_greedy:  # no other number is needed, and a vocabulary has many
            return np.asarray(largest, dtype=np.int64)
        scores = logits.astype(np.float64)
        if self._sampling.repetition_penalty != 1.0:
            for row, sample in zip(scores, samples, strict=True):
                penalize(row, self._written[sample], self._sampling.repetition_penalty)
        if self._sampling.temperature == 0.0:
            chosen = scores.argmax(axis=1)
        else:
            kept = warp(scores, self._sampling)
            chosen = np.array(
                [self._draw(row, sample) for row, sample in zip(kept, samples, strict=True)]
            )
        for sample, token_id in zip(samples, chosen.tolist(), strict=True):
            self._written[sample].add(token_id)
        return np.asarray(chosen, dtype=np.int64)

    def _draw(self, scores: Scores, sample: int) -> int:
        (candidates,) = np.nonzero(scores > -np.inf)
        weights = np.exp(scores[candidates] - scores.max())
        cumulative = np.cumsum(weights)
        drawn = self._streams[sample].random() * cumulative[-1]
        # The product may round up to the whole sum, past the last candidate.
        place = min(np.searchsorted(cumulative, drawn, side="right"), len(candidates) - 1)
        return int(candidates[place])


def penalize(scores: Scores, written: set[int], penalty: float) -> None:
    """Make the tokens that were written already less likely, in one row [V], in place."""
    ids = np.fromiter(written, np.int64, len(written))
    scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)


def warp(scores: Scores, sampling: SamplingPlan) -> Scores:
    """Apply temperature, top-k, top-p and min-p to logits [R, V].

    What falls away becomes -inf; every row is shifted so that its largest is 0.
    """
    with np.errstate(over="ignore"):  # a tiny temperature makes losers -inf, as it should
        scores = (scores - scores.max(axis=1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        bar = np.partition(scores, -sampling.top_k, axis=1)[:, -sampling.top_k, None]
        scores = np.where(scores < bar, -np.inf, scores)
    if sampling.top_p < 1.0:
        scores = np.stack([_keep_nucleus(row, sampling.top_p) for row in scores])
    if sampling.min_p > 0.0:
        scores = np.where(scores < math.log(sampling.min_p), -np.inf, scores)
    return scores


def _keep_nucleus(scores: Scores, top_p: float) -> Scores:
    """Drop the least likely tokens whose probabilities together come to at most 1 - top_p."""
    weights = np.exp(scores)
    probabilities = weights / weights.sum()
    # Tokens this unlikely are dropped whatever their order: all of them together cannot come to
    # more than 1 - top_p. That leaves few to sort.
    (likely,) = np.nonzero(probabilities > (1.0 - top_p) / len(scores))
    order = likely[np.argsort(probabilities[likely], kind="stable")]
    unlikely_mass = 1.0 - probabilities[likely].sum()
    dropped_mass = unlikely_mass + np.cumsum(probabilities[order])
    kept = order[dropped_mass > 1.0 - top_p]
    if kept.size == 0:  # rounding: the likeliest always stays
        kept = np.array([scores.argmax()])
    nucleus = np.full_like(scores, -np.inf)
    nucleus[kept] = scores[kept]
    return nucleus


class StopMatcher:
    """Passes text on until a stop string is complete, and holds back what might become one.

    The stop string that is complete first ends the text, so that the result does not depend on how
    the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what is certain not to belong to a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [(start + len(s), start) for s in self._stop if (start := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            _, start = min(found)
            ready, self._held = self._held[:start], ""
            return ready
        ready_chars = len(self._held) - self._num_open_chars()
        ready, self._held = self._held[:ready_chars], self._held[ready_chars:]
        return ready

    def flush(self) -> str:
        """Return what was held back: the text has ended, it belongs to no stop string."""
        ready, self._held = self._held, ""
        return ready

    def _num_open_chars(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(s) - 1 for s in self._stop), default=0))
        for num_chars in range(longest, 0, -1):
            if any(s.startswith(self._held[-num_chars:]) for s in self._stop):
                return num_chars
        return 0
