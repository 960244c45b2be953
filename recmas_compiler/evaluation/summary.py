"""From checked answers to the figures of a report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any, Final

from recmas_compiler.evaluation.intervals import (
    Interval,
    bootstrap,
    mcnemar,
    mean,
    pass_at,
    wilson,
)
from recmas_compiler.evaluation.runner import ScoredAnswer, SystemAnswers
from recmas_runtime.scheduling.remote_calls import sum_by_model

# Generated tokens, which a latent system saves.
_WRITTEN: Final = ("handover_tokens", "completion_tokens")
_ALL_TOKENS: Final = ("prompt_tokens", *_WRITTEN)


@dataclass(frozen=True, kw_only=True)
class SystemSummary:
    """The figures of one system.

    Attributes:
        num_questions: Questions answered at least once.
        accuracy: Share of right answers, each question weighing the same.
        interval: Wilson's 95 % interval of the accuracy, over questions.
        score: Mean score; differs from accuracy only where the check knows degrees.
        sd: Standard deviation over the seeds; None for fewer than two.
        pass_at: Chance that one of k answers is right, by k; empty for single answers.
        num_no_answer: Texts that hold no answer; they count as wrong.
        num_cut_off: Texts that ended at the limit of tokens.
        loss: Mean loss of the right answers' texts in nats per token, over questions; None where
            that is not scored.
        loss_interval: Bootstrap 95 % interval of it.
        chance: Share of right answers by chance, where candidates are ranked.
        num_other_kind: Candidates of another kind than the right answer, over all questions.
        num_repeated: Questions answered from messages of a record that sent to another one too.
        num_same_input: Questions answered from messages of a record that showed an agent the same
            text.
        failed: Records that could not be run, with the reason; they count as wrong.
        usage: Means per answer: tokens, latent steps.
        remote: By remote model, what all its calls took.
        rounds: Mean rounds that ran; None if no record did.
        ms: Mean milliseconds per question by phase: the batch's time, shared evenly.
    """

    name: str
    is_complete: bool
    num_questions: int
    num_answers: int
    num_right: int
    accuracy: float
    interval: Interval
    score: float
    by_seed: dict[str, float]
    sd: float | None
    pass_at: dict[str, float]
    num_no_answer: int
    num_cut_off: int
    loss: float | None
    loss_interval: Interval | None
    chance: float | None
    num_other_kind: int
    num_repeated: int
    num_same_input: int
    failed: tuple[dict[str, str], ...]
    usage: dict[str, float]
    remote: dict[str, dict[str, Any]]
    rounds: float | None
    ms: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference over questions, and its interval."""

    mean: float
    interval: Interval

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Return the mean of differences, one a question."""
        return cls(mean=mean(values), interval=bootstrap(values))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A system beside the first one, on the questions that both answered.

    A question counts for the system that has it right more often; with one answer each that is
    McNemar's test. Differences are this system's figure minus the first one's, with paired
    bootstrap intervals of 95 %.

    Attributes:
        num_only_system: Questions that only it has right (more often).
        num_only_against: Questions that only the first has right (more often).
        p: Exact, two-sided: the chance of such a split between equally good systems.
        accuracy: Difference of the shares of right answers.
        score: Difference of the scores, where a check knows degrees; else None.
        loss: Difference of the losses of right answers, on the questions that both could run; None
            where that is not scored.
    """

    system: str
    against: str
    num_questions: int
    num_only_system: int
    num_only_against: int
    p: float
    accuracy: Difference
    score: Difference | None
    loss: Difference | None


@dataclass(frozen=True, kw_only=True)
class Saving:
    """A system beside the one whose agents write text to each other.

    Attributes:
        speed_up: How many times faster, per question.
        written_tokens: Change of the tokens written, hand-overs and answer: -0.5 is half.
        all_tokens: Change of all tokens, prompts included.
    """

    system: str
    against: str
    speed_up: float | None
    written_tokens: float | None
    all_tokens: float | None


def summarize(answers: SystemAnswers) -> SystemSummary:
    """Return the figures of one system; at least one answer must be there."""
    scored = answers.scored
    right = right_by_question(scored)
    accuracy = mean(right.values())
    by_seed = {
        str(seed): mean(one.correct for one in scored if one.seed == seed)
        for seed in dict.fromkeys(one.seed for one in scored)
    }
    ran = [(one, one.answer) for one in scored if one.answer is not None]
    losses = list(losses_by_question(scored).values())
    senders = {one.id: one.sender for one in scored if one.sender is not None}
    ranked = [one for one in scored if one.num_candidates > 1]
    return SystemSummary(
        name=answers.name,
        is_complete=answers.is_complete,
        num_questions=len(right),
        num_answers=len(scored),
        num_right=sum(one.correct for one in scored),
        accuracy=accuracy,
        interval=wilson(accuracy * len(right), len(right)),
        score=mean(one.score for one in scored),
        by_seed=by_seed,
        sd=stdev(by_seed.values()) if len(by_seed) > 1 else None,
        pass_at=_pass_at(scored),
        num_no_answer=sum(one.extracted is None for one, _ in ran),
        num_cut_off=sum(answer.get("finish_reason") == "length" for _, answer in ran),
        loss=mean(losses) if losses else None,
        loss_interval=bootstrap(losses) if losses else None,
        chance=mean(1 / one.num_candidates for one in ranked) if ranked else None,
        num_repeated=len(senders) - len(set(senders.values())),
        num_same_input=len({one.id for one in scored if one.same_input}),
        num_other_kind=sum(one.num_other_kind for one in ranked),
        failed=tuple(
            {"id": one.id, "reason": one.failure} for one in scored if one.failure is not None
        ),
        usage=_means(
            {name: count for name, count in answer["usage"].items() if name != "remote"}
            for _, answer in ran
        ),
        remote=sum_by_model(answer["usage"].get("remote", {}) for _, answer in ran),
        rounds=mean(answer["rounds"] for _, answer in ran) if ran else None,
        ms=_means(
            {phase: ms / one.batch_size for phase, ms in answer["timing_ms"].items()}
            for one, answer in ran
        ),
    )


def compare(systems: Sequence[SystemAnswers]) -> tuple[Comparison, ...]:
    """Compare every system after the first with the first, question by question."""
    if not systems:
        return ()
    first, *others = systems
    base, base_scores = right_by_question(first.scored), _scores_by_question(first.scored)
    base_losses = losses_by_question(first.scored)
    found = []
    for other in others:
        right, scores = right_by_question(other.scored), _scores_by_question(other.scored)
        losses = losses_by_question(other.scored)
        shared = [question for question in base if question in right]
        only_system = sum(right[question] > base[question] for question in shared)
        only_against = sum(right[question] < base[question] for question in shared)
        has_degrees = (scores, base_scores) != (right, base)
        both = [question for question in base_losses if question in losses]
        found.append(
            Comparison(
                system=other.name,
                against=first.name,
                num_questions=len(shared),
                num_only_system=only_system,
                num_only_against=only_against,
                p=mcnemar(only_system, only_against),
                accuracy=Difference.of([right[q] - base[q] for q in shared]),
                score=Difference.of([scores[q] - base_scores[q] for q in shared])
                if has_degrees
                else None,
                loss=Difference.of([losses[q] - base_losses[q] for q in both]) if both else None,
            )
        )
    return tuple(found)


def savings(systems: Sequence[SystemSummary]) -> tuple[Saving, ...]:
    """Compare every system's time and tokens with those of the text system, if there is one."""
    by_name = {system.name: system for system in systems}
    capped = (name for name in by_name if name.startswith("text@"))
    text = by_name.get("text") or by_name.get(next(capped, ""))
    if text is None or not text.ms:
        return ()
    return tuple(
        Saving(
            system=system.name,
            against=text.name,
            speed_up=text.ms["total"] / system.ms["total"],
            written_tokens=_change(text.usage, system.usage, _WRITTEN),
            all_tokens=_change(text.usage, system.usage, _ALL_TOKENS),
        )
        for system in systems
        if system is not text and system.ms
    )


def right_by_question(scored: Iterable[ScoredAnswer]) -> dict[str, float]:
    """Return the share of right answers to every question, in the order of the questions."""
    return _mean_by_question((one.id, one.correct) for one in scored)


def losses_by_question(scored: Iterable[ScoredAnswer]) -> dict[str, float]:
    """Return the loss of every question's right answer, in nats per token, where it was scored."""
    return _mean_by_question((one.id, one.loss) for one in scored if one.loss is not None)


def _scores_by_question(scored: Iterable[ScoredAnswer]) -> dict[str, float]:
    return _mean_by_question((one.id, one.score) for one in scored)


def _mean_by_question(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for question, value in values:
        found[question].append(value)
    return {question: mean(listed) for question, listed in found.items()}


def _by_question(scored: Iterable[ScoredAnswer]) -> Mapping[str, list[bool]]:
    answers: defaultdict[str, list[bool]] = defaultdict(list)
    for one in scored:
        answers[one.id].append(one.correct)
    return answers


def _pass_at(scored: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return pass@k for powers of two and for all answers; questions asked less often are out."""
    answers = _by_question(scored)
    num = max(map(len, answers.values()), default=0)
    if num < 2:
        return {}
    whole = [verdicts for verdicts in answers.values() if len(verdicts) == num]
    powers = (2**i for i in range(num.bit_length()))
    counts = sorted({*(k for k in powers if k <= num), num})
    return {
        str(k): mean(pass_at(k, num_answers=num, num_right=sum(verdicts)) for verdicts in whole)
        for k in counts
    }


def _means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    listed = list(rows)
    names = dict.fromkeys(name for row in listed for name in row)
    return {name: mean(row.get(name, 0.0) for row in listed) for name in names}


def _change(
    before: Mapping[str, float], after: Mapping[str, float], names: Sequence[str]
) -> float | None:
    base = sum(before.get(name, 0.0) for name in names)
    return sum(after.get(name, 0.0) for name in names) / base - 1 if base else None
