"""What is measured, running systems by turns on the same questions, and what each run took."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.plan import SamplingPlan, ThinkStep
from recmas_runtime.running.baselines import LATENT
from recmas_runtime.running.batch import PHASES
from recmas_runtime.running.records import Answer, Record
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.running.system import System

UNTRAINED = "untrained-links"
TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table: `latent`, `untrained-links`, or a baseline by its name.

    Attributes:
        rounds: Rounds that were asked for; a baseline may need fewer.
        latent_steps: Most latent steps of one rollout; 0 for none.
        system: What runs. Rows that would run the very same thing share one.
    """

    name: str
    rounds: int
    latent_steps: int
    system: System

    @property
    def writes_handover(self) -> bool:
        """Whether its agents hand over text in the graph and rounds of the latent system."""
        return self.name.partition("@")[0] == TEXT


def make_cases(
    systems: Sequence[System],
    *,
    baselines: Sequence[str],
    sweep: Sequence[System] = (),
    untrained: Sequence[System] = (),
) -> tuple[Case, ...]:
    """Return the rows of a table, all rows of one kind together.

    Baselines run beside each of `systems`, which differ in rounds; those of `sweep` differ in
    latent steps.

    Raises:
        RecmasError: RM508 for a baseline that does not exist or does not fit.
    """
    cases = [_case(LATENT, system) for system in (*systems, *sweep)]
    cases += [_case(UNTRAINED, system) for system in untrained]
    for name in dict.fromkeys(baselines):
        same_kind: list[Case] = []
        for system in systems:
            baseline = system.baseline(name)
            equal = (c.system for c in same_kind if c.system.plan == baseline.plan)
            case = _case(name, next(equal, baseline), rounds=system.plan.rounds)
            same_kind.append(case)
        cases += same_kind
    return tuple(cases)


def _case(name: str, system: System, *, rounds: int | None = None) -> Case:
    plan = system.plan
    thinks = (step for step in plan.steps if isinstance(step, ThinkStep))
    return Case(
        name=name,
        rounds=plan.rounds if rounds is None else rounds,
        latent_steps=max((plan.num_latent_steps(step) for step in thinks), default=0),
        system=system,
    )


# Of `Usage`, and what else is counted of a run.
USAGE: Final = ("prompt_tokens", "latent_steps", "handover_tokens", "completion_tokens")
# What remote models took; zero where none is asked.
REMOTE: Final = ("remote_calls", "remote_prompt_tokens", "remote_completion_tokens", "remote_cost")
COUNTS: Final = (*USAGE, "rounds", "texts", "cut_texts", *REMOTE)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure."""

    records: tuple[Record, ...]
    batch: int
    warmup: int
    repeats: int
    sampling: SamplingPlan

    @property
    def batches(self) -> tuple[tuple[Record, ...], ...]:
        """The records as they run together."""
        starts = range(0, len(self.records), self.batch)
        return tuple(self.records[start : start + self.batch] for start in starts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one system took for one batch, from records to answers; counts are sums over records.

    Attributes:
        first_ms: Until the first tokens of the answers were there.
        answer_tokens: Of each answer.
    """

    ms: float
    first_ms: float
    answer_tokens: tuple[int, ...]
    phases: Mapping[str, float]
    counts: Mapping[str, float]
    problems: tuple[Problem, ...]


# (place of the system, repeat from 0, place of the batch)
RunKey = tuple[int, int, int]


def measure(
    cases: Sequence[Case],
    settings: BenchSettings,
    *,
    runs: MutableMapping[RunKey, Run],
    progress: Progress,
) -> None:
    """Run every system on every batch, in each repeat; those that share a `System` run once.

    On a batch all systems take turns, and each time another one begins: what makes the machine
    slower for a while hits all of them alike. `runs` fills as they end, so that an interruption
    keeps them.

    Raises:
        RecmasError: RM508 for records that a control cannot be over.
    """
    places = distinct_places(cases)
    # Controls are over all records, whatever the batches.
    over = {p: replace(cases[p], system=cases[p].system.over(settings.records)) for p in places}
    batches = settings.batches
    total = (settings.warmup + settings.repeats) * len(batches) * len(places)
    with progress.stage("Measuring", total) as advance:
        for repeat in range(-settings.warmup, settings.repeats):
            for number, batch in enumerate(batches):
                first = (repeat + number) % len(places)
                for place in (*places[first:], *places[:first]):
                    run = run_once(over[place], batch, settings.sampling)
                    if repeat >= 0:
                        runs[place, repeat, number] = run
                    advance()


def distinct_places(cases: Sequence[Case]) -> tuple[int, ...]:
    """Return the place of each system's first row."""
    found: dict[int, int] = {}
    for place, case in enumerate(cases):
        found.setdefault(id(case.system), place)
    return tuple(found.values())


def run_once(case: Case, batch: Sequence[Record], sampling: SamplingPlan) -> Run:
    """Answer a batch and return what it took."""
    texts = _TextCounter()
    start = time.perf_counter()
    results = case.system.run_batch(batch, sampling=sampling, trace=texts)
    ms = (time.perf_counter() - start) * 1e3
    answers = [result for result in results if isinstance(result, Answer)]
    counts: dict[str, float] = {}
    counts |= {name: sum(getattr(a.usage, name) for a in answers) for name in USAGE}
    remote = [took for answer in answers for took in answer.usage.remote.values()]
    for name in REMOTE:
        own = (getattr(took, name.removeprefix("remote_")) for took in remote)
        counts[name] = sum(value or 0 for value in own)
    counts |= {"rounds": sum(answer.rounds for answer in answers)}
    counts |= {"texts": texts.num_texts, "cut_texts": texts.num_cut}
    # Every answer of a batch carries the time of the whole batch.
    timing = asdict(answers[0].timing_ms) if answers else {}
    failures = (result for result in results if isinstance(result, RecmasError))
    return Run(
        ms=ms,
        first_ms=texts.first_ms,
        answer_tokens=tuple(answer.usage.completion_tokens for answer in answers),
        phases={phase: timing.get(phase, 0.0) for phase in PHASES},
        counts=counts,
        problems=tuple(problem for failure in failures for problem in failure.problems),
    )


class _TextCounter:
    """Counts hand-over texts, and those that were cut off; notes when the answers began."""

    def __init__(self) -> None:
        self.first_ms = 0.0
        self.num_texts = 0
        self.num_cut = 0

    def add_batch(
        self, records: Sequence[Record], events: Sequence[StepEvent], messages: object
    ) -> None:
        for event in events:
            self.first_ms += event.first_ms  # of the decode, the only one that has any
            if event.texts:
                self.num_texts += len(records) * len(event.agents)
                self.num_cut += sum(event.cut_texts)
