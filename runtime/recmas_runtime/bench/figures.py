"""From single runs to the figures of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from recmas_runtime.bench.measure import COUNTS, BenchSettings, Case, Run, RunKey, distinct_places
from recmas_runtime.running.batch import PHASES


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        return cls(median=median(values), min=min(values), max=max(values))

    def to_json(self) -> dict[str, float]:
        """Return the form that `--json` prints."""
        return {
            "median": round(self.median, 6),
            "min": round(self.min, 6),
            "max": round(self.max, 6),
        }

    def to_text(self, form: str, *, unit: str = "") -> str:
        """Return the median, and the least and the most where they differ."""
        middle = f"{self.median:{form}}{unit}"
        if self.min == self.max:
            return middle
        return f"{middle} ({self.min:{form}} to {self.max:{form}})"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a system takes per question.

    Attributes:
        seconds: Wall time in each repeat.
        phases_ms: Median time by phase.
        counts: Means by the names in `COUNTS`.
    """

    seconds: tuple[float, ...]
    phases_ms: Mapping[str, float]
    counts: Mapping[str, float]

    @property
    def generated_tokens(self) -> float:
        """Tokens of hand-over texts and of the answer."""
        return self.counts["handover_tokens"] + self.counts["completion_tokens"]

    @property
    def sequential_steps(self) -> float:
        """Generated tokens and latent steps: each takes a run of its own through a backbone."""
        return self.generated_tokens + self.counts["latent_steps"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A system beside the text system of the same graph and rounds.

    Attributes:
        against: The text system's name.
        speed_up: Its time over this one's, repeat by repeat.
        token_reduction: Share of the generated tokens that are saved; below 0 for more of them.
        step_reduction: The same with every latent step counted like a token.
    """

    against: str
    speed_up: Spread
    token_reduction: float
    step_reduction: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        comparison: None without a text system to compare with, and for that itself.
    """

    case: Case
    cost: Cost
    comparison: Comparison | None

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        cost, compared = self.cost, self.comparison
        return {
            "system": self.case.name,
            "rounds": self.case.rounds,
            "latent_steps": self.case.latent_steps,
            "seconds_per_question": Spread.of(cost.seconds).to_json(),
            "phases_ms_per_question": {k: round(v, 3) for k, v in cost.phases_ms.items()},
            "per_question": {
                **{name: round(value, 3) for name, value in cost.counts.items()},
                "generated_tokens": round(cost.generated_tokens, 3),
                "sequential_steps": round(cost.sequential_steps, 3),
            },
            "against": None if compared is None else compared.against,
            "speed_up": None if compared is None else compared.speed_up.to_json(),
            "token_reduction": None if compared is None else round(compared.token_reduction, 4),
            "step_reduction": None if compared is None else round(compared.step_reduction, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that a table shows.

    Attributes:
        rows: In the order of the systems; empty if nothing was measured.
        questions: Questions that count.
        left_out: Questions that do not, because a system could not answer one of their batch.
        repeats: Repeats that count.
    """

    rows: tuple[Row, ...]
    questions: int
    left_out: int
    repeats: int


def figures(cases: Sequence[Case], settings: BenchSettings, runs: Mapping[RunKey, Run]) -> Figures:
    """Return the figures of what was measured.

    Only what all systems ran counts. An interrupted repeat counts if there is no whole one, with
    the batches that all systems ran in it.
    """
    batches, places = settings.batches, distinct_places(cases)
    failed = {number for (_, _, number), run in runs.items() if run.problems}
    left_out = sum(len(batches[number]) for number in failed)
    repeats, done = _repeats(settings, runs, places)
    counted = [number for number in done if number not in failed]
    questions = sum(len(batches[number]) for number in counted)
    if not counted:
        return Figures(rows=(), questions=0, left_out=left_out, repeats=0)
    costs = {
        id(cases[place].system): _cost(
            [[runs[place, repeat, number] for number in counted] for repeat in repeats], questions
        )
        for place in places
    }
    rows = []
    for case in cases:
        cost = costs[id(case.system)]
        text = next((c for c in cases if c.writes_handover and c.rounds == case.rounds), None)
        comparison = None
        if text is not None and text is not case:
            comparison = _compare(cost, costs[id(text.system)], against=text.name)
        rows.append(Row(case=case, cost=cost, comparison=comparison))
    return Figures(rows=tuple(rows), questions=questions, left_out=left_out, repeats=len(repeats))


def _repeats(
    settings: BenchSettings, runs: Mapping[RunKey, Run], places: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the repeats that count, and the batches that all systems ran in each of them."""
    everything = list(range(len(settings.batches)))
    done = [
        [number for number in everything if all((p, repeat, number) in runs for p in places)]
        for repeat in range(settings.repeats)
    ]
    whole = [repeat for repeat, numbers in enumerate(done) if numbers == everything]
    return (whole, everything) if whole else ([0], done[0])


def _cost(repeats: Sequence[Sequence[Run]], questions: int) -> Cost:
    """Return the cost per question of a system that ran the same batches in each repeat."""
    return Cost(
        seconds=tuple(sum(run.ms for run in runs) / 1e3 / questions for runs in repeats),
        phases_ms={
            phase: median(sum(run.phases[phase] for run in runs) / questions for runs in repeats)
            for phase in PHASES
        },
        counts={
            name: sum(run.counts[name] for runs in repeats for run in runs)
            / (questions * len(repeats))
            for name in COUNTS
        },
    )


def _compare(ours: Cost, theirs: Cost, *, against: str) -> Comparison:
    # Systems took turns, so slow moments of the machine cancel out within a repeat.
    pairs = zip(ours.seconds, theirs.seconds, strict=True)
    return Comparison(
        against=against,
        speed_up=Spread.of([their_seconds / our_seconds for our_seconds, their_seconds in pairs]),
        # An answer has at least one token, so nothing is divided by 0.
        token_reduction=1.0 - ours.generated_tokens / theirs.generated_tokens,
        step_reduction=1.0 - ours.sequential_steps / theirs.sequential_steps,
    )
