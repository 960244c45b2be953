"""Running systems by turns on the same questions, and what each run took."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from numpy.typing import NDArray

from recmas_runtime.bench.cases import Case
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.running.batch import PHASES
from recmas_runtime.running.records import Answer, Record
from recmas_runtime.running.run_trace import StepEvent

# Of `Usage`, and what else is counted of a run.
USAGE: Final = ("prompt_tokens", "latent_steps", "handover_tokens", "completion_tokens")
COUNTS: Final = (*USAGE, "rounds", "texts", "cut_texts")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes:
        records: What to answer.
        batch: Records that run together.
        warmup: Repeats that do not count.
        repeats: Repeats that count.
        sampling: How tokens are chosen.
    """

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
    """What one system took for one batch.

    Attributes:
        ms: Wall time from records to answers.
        phases: Of it by phase, in milliseconds.
        counts: Sums over the records, by the names in `COUNTS`.
        problems: Why records have no answer.
    """

    ms: float
    phases: Mapping[str, float]
    counts: Mapping[str, int]
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
    """Run every system on every batch, in each repeat.

    On a batch all systems take turns, and each time another one begins: what makes the machine
    slower for a while hits all of them alike.

    Args:
        cases: The systems; those that share a `System` run once.
        settings: How.
        runs: Is filled as runs end, so that an interruption keeps them.
        progress: Is told of every run.

    Raises:
        RecmasError: RM508 for a batch that a baseline cannot run.
    """
    places = distinct_places(cases)
    batches = settings.batches
    total = (settings.warmup + settings.repeats) * len(batches) * len(places)
    with progress.stage("Measuring", total) as advance:
        for repeat in range(-settings.warmup, settings.repeats):
            for number, batch in enumerate(batches):
                first = (repeat + number) % len(places)
                for place in (*places[first:], *places[:first]):
                    run = run_once(cases[place], batch, settings.sampling)
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
    counts = {name: sum(getattr(a.usage, name) for a in answers) for name in USAGE}
    counts |= {"rounds": sum(answer.rounds for answer in answers)}
    counts |= {"texts": texts.num_texts, "cut_texts": texts.num_cut}
    # Every answer of a batch carries the time of the whole batch.
    timing = asdict(answers[0].timing_ms) if answers else {}
    failures = (result for result in results if isinstance(result, RecmasError))
    return Run(
        ms=ms,
        phases={phase: timing.get(phase, 0.0) for phase in PHASES},
        counts=counts,
        problems=tuple(problem for failure in failures for problem in failure.problems),
    )


class _TextCounter:
    """Counts hand-over texts, and those that were cut off."""

    def __init__(self) -> None:
        self.num_texts = 0
        self.num_cut = 0

    def add_event(self, event: StepEvent, *, batch: int) -> None:
        if event.op == "write":
            self.num_texts += batch * len(event.agents)
            self.num_cut += sum(event.cut_texts)

    def add_messages(self, messages: Mapping[str, NDArray[Any]], *, records: Sequence[str]) -> None:
        pass
