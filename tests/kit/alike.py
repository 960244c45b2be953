"""Requests that run beside others, held against each of them alone.

Other rows in an engine call round otherwise, so a text may differ where two tokens are about as
likely; anywhere else a difference is an error.
"""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import recmas_runtime as rt
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.prompts.render import common_prefix
from recmas_runtime.prompts.sampler import Floats, Indices, Sampler
from recmas_runtime.running.baselines import BASELINES, LATENT, apply_baseline
from recmas_runtime.running.controls import MEAN, SHUFFLED
from recmas_runtime.serve.protocol import Ask, Done, Piece
from recmas_runtime.serve.service import Service, ServiceError

# By how much of the largest logit a logit may move when other rows run beside: what two correct
# implementations of one backbone call may differ by.
LOGIT_TOLERANCE = TOLERANCES["hidden_relative"]
# Ways that logits are moved to see whether the token stays.
_MOVES = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a client asks, when it does, and when it leaves.

    Attributes:
        model: The name that its bundle has in the service.
        num_events: Those after which it leaves; None if that many never come.
        patience_s: When it leaves whatever has come.
    """

    record: Mapping[str, object]
    model: str = "tiny"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    rounds: int | None = None
    baseline: str = LATENT
    index: int = 0
    delay_s: float = 0.0
    num_events: int | None = None
    patience_s: float | None = None

    def system(self, system: rt.System) -> rt.System:
        """Return the system that answers this."""
        chosen = system.baseline(self.baseline)
        return chosen if self.rounds is None else chosen.with_rounds(self.rounds)

    def as_record(self) -> rt.Record:
        """Return its record as a run takes it."""
        return rt.Record(id="1", fields=dict(self.record), index=self.index)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All of an answer but its times, or the codes of why there is none."""

    text: str = ""
    finish_reason: str = ""
    rounds: int = 0
    usage: tuple[tuple[str, int], ...] = ()
    codes: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Outcome:
        """Take an answer in its JSON form."""
        return cls(
            text=answer["answer"],
            finish_reason=answer["finish_reason"],
            rounds=answer["rounds"],
            usage=tuple(sorted(answer["usage"].items())),
        )

    @classmethod
    def of_result(cls, result: rt.Answer | rt.RecmasError) -> Outcome:
        """Take what a run returns or raises."""
        if isinstance(result, rt.RecmasError):
            return cls(codes=tuple(problem.code for problem in result.problems))
        return cls.of(result.to_json())


@dataclass
class Tally:
    """What came of comparing.

    Attributes:
        ties: How differences are explained, by the request's place.
    """

    num_alike: int = 0
    num_failed: int = 0
    num_left: int = 0
    ties: dict[int, str] = field(default_factory=dict)

    @property
    def num_compared(self) -> int:
        """Requests that were followed to their end."""
        return self.num_alike + len(self.ties)


def alone(system: rt.System, request: Request) -> Outcome:
    """Answer a request with nothing beside it."""
    try:
        return Outcome.of_result(
            request.system(system).run(request.as_record(), **request.sampling)
        )
    except rt.RecmasError as error:
        return Outcome.of_result(error)


async def served(service: Service, request: Request) -> Outcome | None:
    """Ask a service; None if the client left."""
    await asyncio.sleep(request.delay_s)
    ask = Ask(
        id=0,
        model=request.model,
        record=dict(request.record),
        index=request.index,
        sampling=dict(request.sampling),
        rounds=request.rounds,
        baseline=request.baseline,
    )
    text, num_events = "", 0
    try:
        async with asyncio.timeout(request.patience_s), aclosing(service.ask(ask)) as events:
            async for event in events:
                num_events += 1
                if isinstance(event, Piece):
                    text += event.text
                if isinstance(event, Done):
                    assert text == event.answer["answer"], "pieces that are not the answer"
                    return Outcome.of(event.answer)
                if num_events == request.num_events:
                    return None
    except TimeoutError:
        return None
    except ServiceError as error:
        return Outcome(codes=tuple(problem.code for problem in error.problems))
    raise AssertionError("the events ended without an answer")


def compare(
    system: rt.System,
    requests: Sequence[Request],
    expected: Sequence[Outcome],
    found: Sequence[Outcome | None],
) -> Tally:
    """Demand of every request that was not left what it gets alone, ties of tokens apart."""
    tally = Tally()
    for place, (request, wanted, got) in enumerate(zip(requests, expected, found, strict=True)):
        if got is None:
            tally.num_left += 1
        elif got == wanted:
            tally.num_alike += not got.codes
            tally.num_failed += bool(got.codes)
        else:
            tie = None if got.codes or wanted.codes else find_tie(system, request, wanted, got)
            assert tie is not None, f"request {place}, {request}: {got}, alone {wanted}"
            tally.ties[place] = tie
    return tally


def find_tie(system: rt.System, request: Request, wanted: Outcome, got: Outcome) -> str | None:
    """Return which choice of a token explains a difference; None if none was close."""
    choices, places = _choices_alone(system, request)
    (num_tokens,) = (count for name, count in wanted.usage if name == "completion_tokens")
    first = len(choices) - num_tokens
    texts = [text for _, text in places]
    shared = common_prefix(wanted.text, got.text)
    # Of stop strings, characters are held back over several tokens.
    held = max((len(stop) for stop in request.sampling.get("stop", ())), default=0)
    longer = [place for place, text in enumerate(texts) if len(text) > shared]
    begin = places[longer[0] - 1][0] if longer and longer[0] > 0 else first
    end = places[longer[0]][0] if longer else len(choices)
    if not longer and places:
        begin = places[-1][0]
    answer = range(max(first, begin - held - 1), end)
    for place in (*range(first), *answer):
        choice = choices[place]
        if choice.is_close():
            where = "a hand-over text" if place < first else f"token {place - first + 1}"
            return f"{where}: {choice.gap():.1e} of the largest logit"
    return None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one token was chosen: logits [V], and what the sampler had been through."""

    logits: Floats
    sampling: SamplingPlan
    stream: np.random.Generator
    written: frozenset[int]

    def gap(self) -> float:
        """Return what lies between the two largest logits, as a share of the largest."""
        second, first = np.partition(self.logits, -2)[-2:].astype(float).tolist()
        return float((first - second) / np.abs(self.logits).max())

    def is_close(self) -> bool:
        """Return whether another token may be chosen where each logit moves within tolerance."""
        most = LOGIT_TOLERANCE * np.abs(self.logits).max()
        moves = np.random.default_rng(0)
        chosen = self._chosen(self.logits)
        return any(
            self._chosen(self.logits + moves.choice((-most, most), self.logits.shape)) != chosen
            for _ in range(_MOVES)
        )

    def _chosen(self, logits: Floats) -> int:
        sampler = Sampler(self.sampling, [0])
        sampler._streams, sampler._written = [copy.deepcopy(self.stream)], [set(self.written)]
        return int(sampler.choose(logits[None].astype(np.float32))[0])


def _choices_alone(
    system: rt.System, request: Request
) -> tuple[list[Choice], list[tuple[int, str]]]:
    """Run a request; returns its choices of tokens, and the text after so many of them."""
    text, places = "", []
    with _recorded_choices() as choices:
        stream = request.system(system).stream(request.as_record(), **request.sampling)
        for piece in stream:
            text += piece
            places.append((len(choices), text))
    return choices, places


@contextmanager
def _recorded_choices() -> Iterator[list[Choice]]:
    choices: list[Choice] = []
    choose = Sampler.choose

    def recording(self: Sampler, logits: Floats, rows: Sequence[int] | None = None) -> Indices:
        for row, sample in zip(logits, range(len(logits)) if rows is None else rows, strict=True):
            choices.append(
                Choice(
                    logits=row.copy(),
                    sampling=self._sampling,
                    stream=copy.deepcopy(self._streams[sample]),
                    written=frozenset(self._written[sample]),
                )
            )
        return choose(self, logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "choose", recording)
        yield choices


def usable_baselines(system: rt.System) -> list[str]:
    """Return the baselines that a system has for a single record."""
    usable = []
    for name in (*BASELINES, "text@6"):
        if name in (SHUFFLED, MEAN):  # are over a set
            continue
        try:
            apply_baseline(system.plan, name, system.manifest)
        except rt.RecmasError:
            continue
        usable.append(name)
    return usable


def any_sampling(chance: random.Random, most_tokens: int) -> dict[str, Any]:
    """Draw settings: greedy as often as not, else of every kind."""
    chosen: dict[str, Any] = {"max_new_tokens": chance.randint(1, most_tokens)}
    if chance.random() < 0.5:
        if chance.random() < 0.3:
            chosen["repetition_penalty"] = chance.choice((1.1, 1.5))
        return chosen
    chosen |= {"temperature": chance.choice((0.7, 1.0, 1.5)), "seed": chance.randrange(1000)}
    limit, value = chance.choice(
        (("top_p", 0.9), ("top_k", 20), ("min_p", 0.05), ("repetition_penalty", 1.2))
    )
    chosen[limit] = value
    return chosen
