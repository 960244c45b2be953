"""Remote models as runs ask them: many calls at a time, while other runs use the engines.

A record keeps what it was told, so that it is asked once however often its batch begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import structs

from recmas_runtime.core.errors import RecmasError, RecordError
from recmas_runtime.formats.plan import AskStep, Plan, SamplingPlan, Variant
from recmas_runtime.prompts.render import ChatMessage
from recmas_runtime.remote.model import (
    RemoteModel,
    RemoteReply,
    RemoteRequest,
    RemoteStream,
    remote_seed,
)
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.tools.calls import ToolResult

# By question what came of it.
Replies = dict["RemoteQuestion", RemoteReply | RecmasError]


@dataclass(frozen=True, kw_only=True)
class RemoteQuestion:
    """What an agent of one record asks; equal ones are the same, whatever batch they are in."""

    row: int = field(compare=False)
    agent: str
    model: str
    round: int
    request: RemoteRequest


@dataclass(frozen=True, kw_only=True)
class RemoteUse:
    """What one call took.

    Attributes:
        model: The name that the spec has for it.
        prompt_tokens: As the endpoint counts; None where it does not say.
        completion_tokens: Likewise.
        cost: In the currency of the spec's prices; None without prices or counts.
        ms: Wall time, retries included.
    """

    agent: str
    model: str
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    ms: float


@dataclass(frozen=True, kw_only=True)
class RemoteUsage:
    """What all calls of one model took.

    Attributes:
        uncounted_calls: Those of which the endpoint did not say it; no token of them is here.
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    uncounted_calls: int
    cost: float | None


def usage_by_model(uses: Iterable[RemoteUse]) -> dict[str, RemoteUsage]:
    """Return what calls took, by model."""
    by_model: dict[str, list[RemoteUse]] = {}
    for use in uses:
        by_model.setdefault(use.model, []).append(use)
    return {model: _sum(own) for model, own in by_model.items()}


def sum_by_model(
    usages: Iterable[Mapping[str, Mapping[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Return what several answers took, each by model as JSON has it."""
    found: dict[str, dict[str, Any]] = {}
    for usage in usages:
        for model, own in usage.items():
            total = found.setdefault(model, dict.fromkeys(own))
            for name, value in own.items():
                if value is not None:
                    total[name] = round((total[name] or 0) + value, 9)
    return found


def _sum(uses: Sequence[RemoteUse]) -> RemoteUsage:
    costs = [use.cost for use in uses if use.cost is not None]
    return RemoteUsage(
        calls=len(uses),
        prompt_tokens=sum(use.prompt_tokens or 0 for use in uses),
        completion_tokens=sum(use.completion_tokens or 0 for use in uses),
        uncounted_calls=sum(
            use.prompt_tokens is None or use.completion_tokens is None for use in uses
        ),
        cost=round(sum(costs), 9) if costs else None,
    )


@dataclass(frozen=True, kw_only=True)
class RemoteCalls:
    """The remote models of a bundle; a run that waits for one gives up the lock of the engines."""

    models: Mapping[str, RemoteModel] = field(default_factory=dict)
    lock: EngineLock = field(default_factory=EngineLock)

    def ask(self, questions: Sequence[RemoteQuestion], replies: Sequence[Replies]) -> Told:
        """Put all questions at the same time and return what was replied.

        Args:
            replies: By row, what its record was told before, and is told now.

        Raises:
            RecordError: RM56x of the first record that fails, once all others have replies.
        """
        calls: dict[RemoteQuestion, Future[RemoteReply]] = {}
        try:
            for question in questions:
                if question not in replies[question.row]:
                    calls[question] = self.models[question.model].ask(question.request)
            for question, call in calls.items():
                replies[question.row][question] = self._outcome(call)
        finally:
            for call in calls.values():
                call.cancel()
        return Told(self, [(question, _reply(question, replies)) for question in questions])

    def answers(
        self,
        questions: Sequence[RemoteQuestion],
        replies: Sequence[Replies],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> RemoteAnswers:
        """Return what writes the answers of records, one a question."""
        return RemoteAnswers(self, questions, replies, clock)

    def use(self, question: RemoteQuestion, reply: RemoteReply) -> RemoteUse:
        """Return what a call took."""
        counts = reply.prompt_tokens, reply.completion_tokens
        entry = self.models[question.model].entry
        cost = None if None in counts else entry.cost(counts[0] or 0, counts[1] or 0)
        return RemoteUse(
            agent=question.agent,
            model=question.model,
            prompt_tokens=counts[0],
            completion_tokens=counts[1],
            cost=cost,
            ms=round(reply.ms, 3),
        )

    def _outcome(self, call: Future[RemoteReply]) -> RemoteReply | RecmasError:
        try:
            return self.lock.wait(call)
        except RecmasError as error:
            return error


@dataclass(frozen=True)
class Told:
    """The replies to the questions of one step."""

    calls: RemoteCalls
    replies: Sequence[tuple[RemoteQuestion, RemoteReply]]

    def _of(self, row: int) -> Iterator[tuple[RemoteQuestion, RemoteReply]]:
        return (each for each in self.replies if each[0].row == row)

    def text(self, row: int, agent: str) -> str:
        """Return what an agent wrote for a record; nothing where it was not asked."""
        return next((reply.text for asked, reply in self._of(row) if asked.agent == agent), "")

    def texts(self, row: int) -> tuple[str, ...]:
        """Return all texts of a record, in the order of the agents."""
        return tuple(reply.text for _, reply in self._of(row))

    def num_cut(self, row: int) -> int:
        """Return how many texts of a record ended at their most tokens."""
        return sum(reply.finish_reason == "length" for _, reply in self._of(row))

    def uses(self, row: int) -> tuple[RemoteUse, ...]:
        """Return what the calls of a record took."""
        return tuple(self.calls.use(asked, reply) for asked, reply in self._of(row))


def questions_of(
    step: AskStep,
    plan: Plan,
    seeds: Mapping[int, int],
    sampling: SamplingPlan,
    messages: Callable[[int, str, Variant], tuple[ChatMessage, ...]],
) -> list[RemoteQuestion]:
    """Return what the agents of a step ask, agent-major.

    Args:
        seeds: Of the records that ask, by row.
        sampling: Of the answer.
        messages: Makes the prompt of a row's agent.
    """
    settings = structs.replace(
        SamplingPlan() if step.greedy else sampling,
        max_new_tokens=step.max_new_tokens or sampling.max_new_tokens,
    )
    first = (plan.steps.index(step) + 1) * len(plan.agents)
    return [
        RemoteQuestion(
            row=row,
            agent=agent,
            model=plan.agents[agent].backbone,
            round=step.round,
            request=RemoteRequest(
                messages=messages(row, agent, variant),
                sampling=structs.replace(
                    settings,
                    seed=remote_seed(seed, 0 if step is plan.answer_step else first + group),
                ),
            ),
        )
        for group, (agent, variant) in enumerate(zip(step.agents, step.variants, strict=True))
        for row, seed in seeds.items()
    ]


@dataclass
class RemoteWriter:
    """One answer in the making, as `generation.RowDecoder` tells of it."""

    text: str = ""
    num_tokens: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    num_result_tokens: int = 0
    results: list[ToolResult] = field(default_factory=list)


class RemoteAnswers:
    """The answers of a batch, as `generation.TextGenerator` writes them.

    Attributes:
        uses: By row, once `pieces` has ended.
    """

    def __init__(
        self,
        calls: RemoteCalls,
        questions: Sequence[RemoteQuestion],
        replies: Sequence[Replies],
        clock: Callable[[], float],
    ) -> None:
        self._calls = calls
        self._questions = questions
        self._replies = replies
        self._clock = clock
        self.writers = [RemoteWriter() for _ in questions]
        self.uses: list[RemoteUse] = []
        self.first_at: float | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Write until every text is finished; yields (row, text) as it comes.

        Raises:
            RecordError: RM56x of the first record that fails, once all others have answers.
        """
        streams: dict[int, RemoteStream] = {}
        try:
            for row, question in enumerate(self._questions):
                if question not in self._replies[row]:
                    model = self._calls.models[question.model]
                    streams[row] = model.stream(question.request)
            for row, question in enumerate(self._questions):
                if row in streams:
                    yield from self._streamed(row, question, streams[row])
                elif isinstance(told := self._replies[row][question], RemoteReply):
                    yield from self._piece(row, told.text)
        finally:
            for stream in streams.values():
                stream.cancel()
        for row, question in enumerate(self._questions):
            reply = _reply(question, self._replies)
            writer = self.writers[row]
            writer.num_tokens = reply.completion_tokens or 0
            writer.finish_reason = reply.finish_reason
            self.uses.append(self._calls.use(question, reply))

    def _streamed(
        self, row: int, question: RemoteQuestion, stream: RemoteStream
    ) -> Iterator[tuple[int, str]]:
        while (piece := self._calls.lock.wait(stream.next())) is not None:
            yield from self._piece(row, piece)
        self._replies[row][question] = self._calls._outcome(stream.reply)

    def _piece(self, row: int, piece: str) -> Iterator[tuple[int, str]]:
        if self.first_at is None:
            self.first_at = self._clock()
        self.writers[row].text += piece
        if piece:
            yield row, piece


def _reply(question: RemoteQuestion, replies: Sequence[Replies]) -> RemoteReply:
    found: Any = replies[question.row][question]
    if isinstance(found, RecmasError):
        raise RecordError(question.row, found, names_record=False)
    reply: RemoteReply = found
    return reply
