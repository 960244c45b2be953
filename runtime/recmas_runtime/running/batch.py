"""Records that run together, and the stream of one answer's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from recmas_runtime.core.errors import RecmasError, RecordError, fail
from recmas_runtime.engines.interface import Floats, OutOfMemoryError
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.plan import Plan, ThinkStep
from recmas_runtime.running.executor import Execution
from recmas_runtime.running.generation import RowDecoder, draft_counts, tool_events
from recmas_runtime.running.record_prompts import RecordPrompts, named_failure
from recmas_runtime.running.records import Answer, Record, Timing, Usage
from recmas_runtime.running.run_trace import StepEvent, Trace, reads_thoughts
from recmas_runtime.running.scoring import Scores, check_room, score_candidates
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.scheduling.remote_calls import RemoteWriter, Replies, usage_by_model
from recmas_runtime.sequences.thoughts import RecordReadings, ThoughtReader, Vectors

Result = TypeVar("Result")
PHASES = ("prefill", "think", "send", "write", "decode", "tools", "ask")


class AnswerStream:
    """The text of one answer as it is written; once the iteration has ended, `answer` is set.

    It is read once. Others may run on the same engines between two pieces.
    """

    def __init__(self, batch: Batch, lock: EngineLock) -> None:
        self._batch: Batch | None = batch
        self._lock = lock
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        # Only the iteration holds the batch, so that its caches go when it ends or is given up.
        batch, self._batch = self._batch, None
        if batch is None:
            raise fail(
                "RM512",
                "this stream was read before",
                hint="Take the text from its `answer`, or ask again for another stream.",
            )
        pieces = batch.pieces()
        while True:
            # Not across the yield: the reader may run the system before it wants the next piece.
            with self._lock.held():
                piece = next(pieces, None)
            if piece is None:
                break
            yield piece[1]
        (self.answer,) = batch.answers()


class Batch:
    """Records that run together, from prompts to answers."""

    def __init__(
        self, execution: Execution, records: Sequence[Record], trace: Trace | None
    ) -> None:
        self._execution = execution
        self._records = records
        self._trace = trace
        self._writers: Sequence[RowDecoder | RemoteWriter] = []
        self._total_ms = 0.0

    def run(self) -> list[Answer]:
        """Run everything and return the answers in record order."""
        for _ in self.pieces():
            pass
        return self.answers()

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Run everything; yields (record, text) as text becomes certain."""
        execution, plan = self._execution, self._execution.plan
        clock = execution.clock
        start = clock()
        execution.run_rounds()
        decode_start = clock()
        generator = execution.answer()
        self._writers = generator.writers
        yield from generator.pieces()
        now = clock()
        self._total_ms = (now - start) * 1e3
        agents = (plan.answer_agent,)
        called = tool_events(generator, plan.rounds, agents)
        ms = (now - decode_start) * 1e3 - sum(event.ms for event in called)
        first_ms = ((generator.first_at or now) - start) * 1e3
        decoded = StepEvent(
            op=plan.answer_step.op,
            round=plan.rounds,
            agents=agents,
            ms=ms,
            first_ms=first_ms,
            remote=tuple((use,) for use in generator.uses),
        )
        counts = draft_counts(generator, len(self._records))
        execution.events += [replace(decoded, **counts), *called]
        # Not before: a record that proves too long in a round makes the others start over.
        if self._trace is not None:
            messages = [self._messages(row) for row in range(len(self._records))]
            if reads_thoughts(self._trace):
                readings = self._readings(self._trace.num_nearest)
                self._trace.add_batch(self._records, execution.events, messages, readings)
            else:
                self._trace.add_batch(self._records, execution.events, messages)

    def answers(self) -> list[Answer]:
        """Return the answers in record order, once `pieces` has ended."""
        timing = self._timing()
        return [
            Answer(
                id=record.id,
                record=record.given,
                answer=writer.text,
                finish_reason=writer.finish_reason or "length",
                rounds=self._rounds(row),
                usage=self._usage(row, writer),
                timing_ms=timing,
                batch_size=len(self._records),
                tool_calls=tuple(writer.results),
            )
            for row, (record, writer) in enumerate(zip(self._records, self._writers, strict=True))
        ]

    def score(self, candidates: Sequence[Mapping[str, tuple[int, ...]]]) -> list[Scores]:
        """Run everything before the answer, then read each record's candidates in its place.

        Args:
            candidates: By record, texts and their tokens.

        Raises:
            RecordError: RM501 for a candidate that is too long.
        """
        execution = self._execution
        clock = execution.clock
        start = clock()
        read = [list(texts.values()) for texts in candidates]
        execution.run_rounds()
        begin = clock()
        sequences = execution.answer_sequences
        for row, record in enumerate(self._records):
            check_room(sequences, row, read[row], record)
        found = score_candidates(sequences, read)
        now = clock()
        self._total_ms = (now - start) * 1e3
        plan = execution.plan
        execution.events.append(
            StepEvent(
                op="decode", round=plan.rounds, agents=(plan.answer_agent,), ms=(now - begin) * 1e3
            )
        )
        timing = self._timing()
        return [
            Scores(
                id=record.id,
                record=record.given,
                candidates=tuple(candidates[row]),
                losses=tuple(each.loss for each in found[row]),
                num_tokens=tuple(map(len, read[row])),
                greedy=tuple(each.greedy for each in found[row]),
                rounds=self._rounds(row),
                usage=self._usage(row, None),
                timing_ms=timing,
                batch_size=len(self._records),
            )
            for row, record in enumerate(self._records)
        ]

    def _timing(self) -> Timing:
        events = self._execution.events
        ms = {op: sum(event.ms for event in events if event.op == op) for op in PHASES}
        return Timing(**ms, total=self._total_ms)

    def _rounds(self, row: int) -> int:
        converged = int(self._execution.converged[row])
        return converged + 1 if converged else self._execution.plan.rounds

    def _ran(self, row: int, round_: int) -> bool:
        """Return whether a record took part in a round; some run for its neighbours only."""
        return round_ < self._rounds(row) or round_ == self._execution.plan.rounds

    def _usage(self, row: int, writer: RowDecoder | RemoteWriter | None) -> Usage:
        """Count what a record took; rounds that only its neighbours needed are not among it."""
        plan = self._execution.plan
        events = [event for event in self._execution.events if self._ran(row, event.round)]
        prefilled = sum(event.prefilled_tokens[row] for event in events if event.prefilled_tokens)
        return Usage(
            prompt_tokens=prefilled + (writer.num_result_tokens if writer else 0),
            latent_steps=sum(
                plan.num_latent_steps(step) * len(step.agents)
                for step in plan.steps
                if isinstance(step, ThinkStep) and self._ran(row, step.round)
            ),
            handover_tokens=sum(e.written_tokens[row] for e in events if e.written_tokens),
            completion_tokens=writer.num_tokens if writer else 0,
            remote=usage_by_model(use for e in events if e.remote for use in e.remote[row]),
        )

    def _messages(self, row: int) -> dict[str, Floats]:
        """Return the messages [m, d] of the rounds that a record ran, by link and round.

        Text and rows are no vectors and do not appear.
        """
        return {
            f"{link}@{round_}": np.asarray(messages[row])
            for (link, round_), messages in self._execution.messages.items()
            if self._execution.plan.links[link].has_vectors and self._ran(row, round_)
        }

    def _readings(self, num_nearest: int) -> list[RecordReadings]:
        """Return what was thought and sent in the rounds that each record ran, as tokens."""
        execution = self._execution
        engines = execution.engines
        reader = ThoughtReader(
            plan=execution.plan,
            backbones=engines.backbones,
            tokenizers={name: s.tokenizer for name, s in engines.decoder_settings.items()},
            num_nearest=num_nearest,
        )
        thoughts: Vectors = {
            (row, agent, round_): found[:, row]
            for (agent, round_), (found, _) in execution.thoughts.items()
            for row in range(len(self._records))
            if self._ran(row, round_)
        }
        inputs: Vectors = {
            (row, inner_link_id(agent), round_): execution.thoughts[agent, round_][1][:, row]
            for row, agent, round_ in thoughts
        } | {
            (row, link, round_): np.asarray(message[row])
            for (link, round_), message in execution.messages.items()
            if execution.plan.links[link].has_vectors
            for row in range(len(self._records))
            if self._ran(row, round_)
        }
        return reader.read(thoughts, inputs, len(self._records))


@dataclass(frozen=True)
class Ready:
    """A record that can run, and its place in the input.

    Attributes:
        sender: The prompts of the record whose messages it gets; None for its own.
        replies: What remote models have told it, however often it runs.
    """

    index: int
    record: Record
    prompts: RecordPrompts
    sender: RecordPrompts | None = None
    candidates: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    replies: Replies = field(default_factory=dict)


def records_of(part: Sequence[Ready]) -> list[Record]:
    """Return the records of a batch."""
    return [ready.record for ready in part]


def run_or_split(
    part: Sequence[Ready],
    run: Callable[[Sequence[Ready]], list[Result]],
    *,
    lock: EngineLock,
    free_memory: Callable[[], None],
) -> list[tuple[int, Result | RecmasError]]:
    """Run a batch; a record that fails leaves it, and the others run again.

    Where it is not known whose failure it is, or memory runs out, the batch runs in two halves.
    """
    failure: RecmasError
    # Before the handlers: a run that must not begin is nobody's failure.
    with lock.held():
        try:
            return [(ready.index, one) for ready, one in zip(part, run(part), strict=True)]
        except RecordError as error:
            failure, failed = error, [part[error.record]]
            parts = [[*part[: error.record], *part[error.record + 1 :]]]
        except (RecmasError, MemoryError) as error:
            if isinstance(error, MemoryError | OutOfMemoryError):
                # An error holds on to all that the batch has allocated.
                failure = without_memory(error)
            else:
                failure = error
            middle = len(part) // 2
            failed = [] if middle else list(part)
            parts = [list(part[:middle]), list(part[middle:])] if middle else []
    if isinstance(failure, OutOfMemoryError):
        free_memory()
    results: list[tuple[int, Result | RecmasError]] = []
    results += ((ready.index, named_failure(failure, ready.record)) for ready in failed)
    for smaller in filter(None, parts):
        again = run_or_split(smaller, run, lock=lock, free_memory=free_memory)
        results += again
    return results


def without_memory(error: OutOfMemoryError | MemoryError) -> OutOfMemoryError:
    """Return the error of a run whose memory ran out, without what led to it."""
    if isinstance(error, RecmasError):
        return OutOfMemoryError.of(error.problems)
    return OutOfMemoryError("the caches and inputs of a batch do not fit")


def check_batch(batch: int, plan: Plan) -> None:
    """Raise RM506 for a batch that is more than a bundle takes."""
    if not 1 <= batch <= plan.limits.max_batch:
        raise fail(
            "RM506",
            f"--batch {batch}, the bundle takes 1 to {plan.limits.max_batch}",
            hint="Choose a smaller batch, or build with a larger build.max_batch.",
        )
