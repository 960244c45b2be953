"""Asks systems the questions of a data set, checks the answers, keeps them on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

from msgspec import structs

from recmas_compiler.evaluation.candidates import Candidates, candidates_of
from recmas_compiler.evaluation.checks.verdict import NO_ANSWER, Check, Verdict, gold_texts
from recmas_compiler.evaluation.data.data_file import Question
from recmas_compiler.evaluation.data.protocol import MAX_ROLLOUTS, Protocol
from recmas_compiler.evaluation.intervals import mean
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.running.controls import SEED
from recmas_runtime.running.records import Answer
from recmas_runtime.running.scoring import Scores
from recmas_runtime.running.system import System

# Record i of a run draws from stream seed + i. Runs whose seeds lie this far apart share none.
_STREAMS_PER_RUN: Final = 2**24


_BATCHES_OF_A_JOB: Final = 4


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch of one seed and rollout; numbers count all jobs of a system, from 0."""

    number: int
    seed: int
    rollout: int
    questions: tuple[Question, ...]


def plan_jobs(
    questions: Sequence[Question], protocol: Protocol, *, batch_size: int
) -> tuple[Job, ...]:
    """Return all jobs of a system in order.

    The batches are the same in every run, so that one which was interrupted goes on as if it had
    not been, and as even as can be, so that no record is left to run alone.
    """
    num_batches = -(-len(questions) // batch_size)
    bounds = [i * len(questions) // num_batches for i in range(num_batches + 1)]
    parts = [tuple(questions[start:end]) for start, end in pairwise(bounds)]
    runs = [(seed, rollout) for seed in protocol.seeds for rollout in range(protocol.rollouts)]
    return tuple(
        Job(number=run * num_batches + i, seed=seed, rollout=rollout, questions=part)
        for run, (seed, rollout) in enumerate(runs)
        for i, part in enumerate(parts)
    )


def sampling_of(job: Job, protocol: Protocol, bundle: SamplingPlan) -> SamplingPlan:
    """Return a job's sampling settings: the protocol's, and the bundle's where it has none."""
    return structs.replace(
        bundle,
        max_new_tokens=protocol.max_new_tokens or bundle.max_new_tokens,
        temperature=protocol.temperature,
        top_p=protocol.top_p,
        top_k=protocol.top_k,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=(job.seed * MAX_ROLLOUTS + job.rollout) * _STREAMS_PER_RUN,
    )


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """An answer with its verdict, or why there is none.

    Attributes:
        extracted: What was taken for the answer; None for none.
        batch_size: Records that shared its batch, and the batch's time.
        answer: The whole answer as `recmas run --json` has it; None if the record failed.
        target: The right answer, or several that count as right; None for unit tests.
        sender: The record whose messages the answer agent got; None for its own.
        same_input: Whether that one showed an agent the same text, because nothing else was left.
        loss: Of the right answer's text in nats per token, where that is scored.
        rank: Its place among the candidates, 1 for the likeliest.
        num_candidates: Itself included.
        num_other_kind: Candidates of another kind than it.
    """

    id: str
    seed: int
    rollout: int
    correct: bool
    extracted: str | None
    score: float
    batch_size: int
    answer: dict[str, Any] | None
    failure: str | None
    target: Any = None
    sender: str | None = None
    same_input: bool = False
    loss: float | None = None
    rank: int | None = None
    num_candidates: int = 0
    num_other_kind: int = 0


class AnswerLog:
    """The file of all answers of a system: whole jobs only, an unfinished one is cut off.

    Raises:
        RecmasError: RM503 if it cannot be written, RM603 if what is there is of other jobs.
    """

    def __init__(self, path: Path, jobs: Sequence[Job], *, resume: bool) -> None:
        self._path = path
        self.scored: list[ScoredAnswer] = []  # those read at the start included
        self.num_jobs = 0
        try:
            self._file = JsonLines(path)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._file.keep(self._read_jobs(jobs) if resume else 0)
        except BaseException:
            self._file.close()
            raise

    def append(self, scored: Sequence[ScoredAnswer]) -> None:
        """Write the answers of the next job.

        Raises:
            RecmasError: RM503; the jobs before it are kept.
        """
        try:
            self._file.append(*map(asdict, scored))
        except OSError as error:
            raise self._unwritable(error) from error
        self.scored += scored
        self.num_jobs += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _read_jobs(self, jobs: Sequence[Job]) -> int:
        """Read whole jobs back; returns the bytes that they take."""
        lines = list(self._file.lines())
        taken = 0
        for job in jobs:
            part = lines[taken : taken + len(job.questions)]
            if len(part) < len(job.questions):
                break
            found = [self._read(line, taken + i) for i, line in enumerate(part, start=1)]
            wanted = [(str(q.record.id), job.seed, job.rollout) for q in job.questions]
            if [(one.id, one.seed, one.rollout) for one in found] != wanted:
                raise self._foreign(taken + 1)
            self.scored += found
            self.num_jobs += 1
            taken += len(part)
        return sum(map(len, lines[:taken]))

    def _read(self, line: bytes, number: int) -> ScoredAnswer:
        try:
            return ScoredAnswer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise self._foreign(number) from error

    def _foreign(self, line: int) -> RecmasError:
        return fail(
            "RM603",
            "--resume found a line that is not an answer of this evaluation",
            file=str(self._path),
            line=line,
            hint="Name the folder of the interrupted run, or another --out to start afresh.",
        )

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the answers cannot be written: {error.strerror}",
            file=str(self._path),
            hint="Make room or choose another --out; --resume goes on from the finished answers.",
        )


@dataclass(frozen=True, kw_only=True)
class SystemAnswers:
    """Everything that one system answered.

    Attributes:
        scored: In the order of the jobs.
        num_wanted: Answers of the whole evaluation; there are fewer after an interruption.
    """

    name: str
    scored: tuple[ScoredAnswer, ...]
    num_wanted: int

    @property
    def is_complete(self) -> bool:
        """Whether every question was asked as often as it should be."""
        return len(self.scored) == self.num_wanted


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of a run; an interruption may have kept systems from answering anything."""

    systems: tuple[SystemAnswers, ...]
    interrupted: bool


def run_systems(
    systems: Mapping[str, Callable[[], System]],
    questions: Sequence[Question],
    *,
    protocol: Protocol,
    check: Check,
    batch_size: int,
    folder: Path,
    resume: bool,
    opening: str,
    title: str,
    seed: int = SEED,
    progress: Progress,
    on_answers: Callable[[str, Sequence[ScoredAnswer]], None] | None = None,
) -> Evaluation:
    """Ask all systems in turn, a few batches each, so that busy times of a machine fall on all.

    Args:
        systems: By name; each is made when its turn comes.
        batch_size: Most records that run at a time.
        folder: Gets `answers-NAME.jsonl`.
        opening: What the prompt has begun of the answer, such as a mark that opens thinking.
        title: Of the progress.
        seed: Of the permutation of `shuffled`.
        on_answers: Is given a system's name and all its answers whenever there are more.

    Raises:
        RecmasError: What concerns the whole run, such as sampling settings out of bounds or an
            engine that fails; finished batches are kept.
    """
    # A job of several batches lets the next record begin while a long one still runs.
    in_job = _BATCHES_OF_A_JOB * batch_size if protocol.score.by == "text" else batch_size
    jobs = plan_jobs(questions, protocol, batch_size=in_job)
    num_wanted = sum(len(job.questions) for job in jobs)
    judge = _Judge(check, opening)
    scored_by = protocol.score.by
    drawn: dict[str, Candidates] = {}
    if scored_by != "text":
        found = candidates_of(questions, protocol.score)
        drawn = {str(q.record.id): one for q, one in zip(questions, found, strict=True)}
    with ExitStack() as stack:
        logs = {
            name: stack.enter_context(
                AnswerLog(folder / f"answers-{name}.jsonl", jobs, resume=resume)
            )
            for name in systems
        }
        left = [
            (name, job) for job in jobs for name, log in logs.items() if log.num_jobs <= job.number
        ]
        before = sum(len(log.scored) for log in logs.values())
        made: dict[str, System] = {}
        interrupted = False
        try:
            with progress.stage(title, num_wanted * len(systems), done=before) as advance:
                for name, job in left:
                    if name not in made:
                        made[name] = _over(systems[name](), questions, protocol, seed)
                    if scored_by == "text":
                        scored = _run_job(made[name], job, protocol, judge, batch_size)
                    else:
                        scored = _score_job(made[name], job, drawn)
                    logs[name].append(scored := _with_senders(scored, made[name], job))
                    if on_answers is not None:
                        on_answers(name, logs[name].scored)
                    advance(len(scored), note=_shares(logs))
        except KeyboardInterrupt:
            interrupted = True
        return Evaluation(
            systems=tuple(
                SystemAnswers(name=name, scored=tuple(log.scored), num_wanted=num_wanted)
                for name, log in logs.items()
            ),
            interrupted=interrupted,
        )


def _shares(logs: Mapping[str, AnswerLog]) -> str:
    """Return how much each system has right so far."""
    shares = {
        name: f"{sum(one.correct for one in log.scored) / len(log.scored):.1%}"
        for name, log in logs.items()
        if log.scored
    }
    losses = {
        name: f"{mean(told):.3f}"
        for name, log in logs.items()
        if (told := [one.loss for one in log.scored if one.loss is not None])
    }
    if losses:
        return "nats per token: " + ", ".join(f"{name} {loss}" for name, loss in losses.items())
    if len(logs) == 1:
        return f"{next(iter(shares.values()))} right"
    return "right: " + ", ".join(f"{name} {share}" for name, share in shares.items())


@dataclass(frozen=True)
class _Judge:
    """A check, and what prompts have begun of every answer."""

    check: Check
    opening: str

    def __call__(self, answer: str, question: Question) -> Verdict:
        return self.check(self.opening + answer, question)


def _over(system: System, questions: Sequence[Question], protocol: Protocol, seed: int) -> System:
    """Return a control over the whole set, whatever batches it is asked in."""
    has_texts = protocol.check.kind != "code"
    answers = [gold_texts(question) if has_texts else () for question in questions]
    return system.over([question.record for question in questions], answers=answers, seed=seed)


def _with_senders(scored: list[ScoredAnswer], system: System, job: Job) -> list[ScoredAnswer]:
    """Note whose messages the answers were written from, where these were of another record."""
    covered = system.covered
    if covered is None or covered.mean is not None:
        return scored
    records = [question.record for question in job.questions]
    return [
        replace(one, sender=str(covered.sender(r).id), same_input=covered.has_same_input(r))
        if one.failure is None
        else one
        for one, r in zip(scored, records, strict=True)
    ]


def _score_job(system: System, job: Job, drawn: Mapping[str, Candidates]) -> list[ScoredAnswer]:
    candidates = [drawn[str(question.record.id)] for question in job.questions]
    results = system.score_batch(
        [question.record for question in job.questions], [one.texts for one in candidates]
    )
    batch_size = sum(isinstance(result, Scores) for result in results)
    return [
        _ranked(result, question, job, one, batch_size)
        for result, question, one in zip(results, job.questions, candidates, strict=True)
    ]


def _ranked(
    result: Scores | RecmasError,
    question: Question,
    job: Job,
    candidates: Candidates,
    batch_size: int,
) -> ScoredAnswer:
    unscored = ScoredAnswer(
        id=str(question.record.id),
        seed=job.seed,
        rollout=job.rollout,
        correct=False,
        extracted=None,
        score=0.0,
        batch_size=0,
        answer=None,
        failure=result.problems[0].message if isinstance(result, RecmasError) else None,
        target=question.gold.get("answer"),
        num_candidates=len(candidates.texts),
        num_other_kind=candidates.num_other_kind,
    )
    if isinstance(result, RecmasError):
        return unscored
    means, has_others = result.mean_losses, len(candidates.texts) > 1
    likeliest = candidates.texts[min(range(len(means)), key=means.__getitem__)]
    rank = result.rank(candidates.gold)
    is_right = has_others and rank == 1
    return replace(
        unscored,
        correct=is_right,
        extracted=likeliest if has_others else None,
        score=float(is_right),
        batch_size=batch_size,
        answer=result.to_json(),
        loss=means[candidates.gold],
        rank=rank if has_others else None,
    )


def _run_job(
    system: System, job: Job, protocol: Protocol, judge: _Judge, at_once: int
) -> list[ScoredAnswer]:
    sampling = sampling_of(job, protocol, system.plan.sampling)
    records = [q.record for q in job.questions]
    results = system.answer_all(records, at_once=at_once, sampling=sampling)
    return [
        _score(result, question, job, judge)
        for result, question in zip(results, job.questions, strict=True)
    ]


def _score(
    result: Answer | RecmasError, question: Question, job: Job, judge: _Judge
) -> ScoredAnswer:
    verdict, answer, failure, batch_size = NO_ANSWER, None, None, 0
    if isinstance(result, RecmasError):
        failure = result.problems[0].message
    else:
        batch_size = result.batch_size
        verdict, answer = judge(result.answer, question), result.to_json()
    return ScoredAnswer(
        id=str(question.record.id),
        seed=job.seed,
        rollout=job.rollout,
        correct=verdict.correct,
        extracted=verdict.extracted,
        score=verdict.score,
        batch_size=batch_size,
        answer=answer,
        failure=failure,
        target=question.gold.get("answer"),
    )
