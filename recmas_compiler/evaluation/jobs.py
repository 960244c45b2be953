"""What an evaluation asks, in which order: seeds, rollouts, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from msgspec import structs

from recmas_compiler.evaluation.checks.verdict import Question
from recmas_compiler.evaluation.protocol import MAX_ROLLOUTS, Protocol
from recmas_runtime.formats.plan import SamplingPlan

# Record i of a run draws from stream seed + i. Runs whose seeds lie this far apart share none.
_STREAMS_PER_RUN: Final = 2**24


@dataclass(frozen=True, kw_only=True)
class Job:
    """One batch of one seed and rollout.

    Attributes:
        number: Place in the order of all jobs, from 0.
        seed: As the protocol has it.
        rollout: From 0.
        questions: What is asked.
    """

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
    """Return how a job's answers are drawn: as the protocol says, for the rest as the bundle."""
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
