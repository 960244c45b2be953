"""Asks systems the questions of a data set, judges the answers, keeps them on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recmas_compiler.evaluation.answer_log import AnswerLog, Judged
from recmas_compiler.evaluation.checks.verdict import Check, Question
from recmas_compiler.evaluation.jobs import Job, plan_jobs, sampling_of
from recmas_compiler.evaluation.protocol import Protocol
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.running.records import Answer
from recmas_runtime.running.system import System


@dataclass(frozen=True, kw_only=True)
class SystemAnswers:
    """Everything that one system answered.

    Attributes:
        name: `latent` or the baseline's name.
        judged: In the order of the jobs.
        num_wanted: Answers of the whole evaluation; there are fewer after an interruption.
    """

    name: str
    judged: tuple[Judged, ...]
    num_wanted: int

    @property
    def is_complete(self) -> bool:
        """Whether every question was asked as often as it should be."""
        return len(self.judged) == self.num_wanted


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of a run.

    Attributes:
        systems: In the order they were asked for; those not reached are left out.
        interrupted: Whether the user stopped it.
    """

    systems: tuple[SystemAnswers, ...]
    interrupted: bool


def check_gold(check: Check, questions: Sequence[Question]) -> None:
    """Refuse questions that the check cannot use, before anything is asked.

    Raises:
        RecmasError: RM601.
    """
    for question in questions:
        check("", question)


def run_systems(
    systems: Mapping[str, Callable[[], System]],
    questions: Sequence[Question],
    *,
    protocol: Protocol,
    check: Check,
    batch_size: int,
    folder: Path,
    resume: bool,
    progress: Progress,
) -> Evaluation:
    """Ask one system after the other.

    Args:
        systems: By name; each is made when its turn comes.
        questions: What to ask.
        protocol: How to ask.
        check: Judges the answers.
        batch_size: Most records per batch.
        folder: Gets `answers-NAME.jsonl`.
        resume: Go on from the answers that are there.
        progress: Counts answers.

    Raises:
        RecmasError: What concerns the whole run, such as sampling settings out of bounds or an
            engine that fails; finished batches are kept.
    """
    jobs = plan_jobs(questions, protocol, batch_size=batch_size)
    num_wanted = sum(len(job.questions) for job in jobs)
    done: list[SystemAnswers] = []
    for name, make in systems.items():
        interrupted = False
        with AnswerLog(folder / f"answers-{name}.jsonl", jobs, resume=resume) as log:
            try:
                title, before = f"{protocol.name} {name}", len(log.judged)
                with progress.stage(title, num_wanted, done=before) as advance:
                    left = jobs[log.num_jobs :]
                    system = make() if left else None
                    for job in left:
                        assert system is not None
                        judged = _run_job(system, job, protocol, check)
                        log.append(judged)
                        num_right = sum(one.correct for one in log.judged)
                        note = f"{num_right / len(log.judged):.1%} right"
                        advance(len(judged), note=note)
            except KeyboardInterrupt:
                interrupted = True
            done.append(SystemAnswers(name=name, judged=tuple(log.judged), num_wanted=num_wanted))
        if interrupted:
            return Evaluation(systems=tuple(done), interrupted=True)
    return Evaluation(systems=tuple(done), interrupted=False)


def _run_job(system: System, job: Job, protocol: Protocol, check: Check) -> list[Judged]:
    sampling = sampling_of(job, protocol, system.plan.sampling)
    results: list[Answer | RecmasError]
    try:
        results = system.run_batch([q.record for q in job.questions], sampling=sampling)
    except RecmasError as error:
        # Of this batch, only one record is left for a baseline that needs two.
        if error.problems[0].code != "RM508":
            raise
        results = [error for _ in job.questions]
    # Records that cannot be run share neither the batch nor its time.
    batch_size = sum(isinstance(result, Answer) for result in results)
    return [
        _judge(result, question, job, check, batch_size)
        for result, question in zip(results, job.questions, strict=True)
    ]


def _judge(
    result: Answer | RecmasError, question: Question, job: Job, check: Check, batch_size: int
) -> Judged:
    if isinstance(result, RecmasError):
        return Judged(
            id=question.record.id,
            seed=job.seed,
            rollout=job.rollout,
            correct=False,
            extracted=None,
            score=0.0,
            batch_size=0,
            answer=None,
            failure=result.problems[0].message,
        )
    verdict = check(result.answer, question)
    return Judged(
        id=question.record.id,
        seed=job.seed,
        rollout=job.rollout,
        correct=verdict.correct,
        extracted=verdict.extracted,
        score=verdict.score,
        batch_size=batch_size,
        answer=result.to_json(),
        failure=None,
    )
