"""A measurement as a whole: from single runs to figures, as JSON or as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from statistics import median
from typing import Any, Final

from recmas_runtime.bench.latency import PERCENTILES, Latency
from recmas_runtime.bench.measure import (
    COUNTS,
    REMOTE,
    BenchSettings,
    Case,
    Run,
    RunKey,
    distinct_places,
    measure,
)
from recmas_runtime.checking.machine import describe_machine
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.text import counted, markdown_table
from recmas_runtime.engines.onnx.session import physical_cores
from recmas_runtime.running.baselines import LATENT
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
        return {name: round(value, 6) for name, value in asdict(self).items()}

    def to_text(self, form: str, *, unit: str = "") -> str:
        """Return the median, and the least and the most where they differ."""
        middle = f"{self.median:{form}}{unit}"
        if self.min == self.max:
            return middle
        return f"{middle} ({self.min:{form}} to {self.max:{form}})"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a system takes per question: seconds by repeat, medians by phase, means of `COUNTS`."""

    seconds: tuple[float, ...]
    phases_ms: Mapping[str, float]
    counts: Mapping[str, float]
    latency: Latency

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
    """A system beside the text system of the same graph and rounds, `against`.

    Speed-up is its time over this one's, repeat by repeat. Tokens that are saved are a share of the
    generated ones, below 0 for more of them; for steps, every latent step counts like a token.
    """

    against: str
    speed_up: Spread
    token_reduction: float
    step_reduction: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table; without a comparison if there is no text system, or it is that itself."""

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
            "phases_ms_per_question": {
                name: round(ms, 3) for name, ms in cost.phases_ms.items() if ms or name != "ask"
            },
            "per_question": {
                **{
                    name: round(value, 6 if name in REMOTE else 3)
                    for name, value in cost.counts.items()
                    if value or name not in REMOTE
                },
                "generated_tokens": round(cost.generated_tokens, 3),
                "sequential_steps": round(cost.sequential_steps, 3),
            },
            "latency": cost.latency.to_json(),
            "against": None if compared is None else compared.against,
            "speed_up": None if compared is None else compared.speed_up.to_json(),
            "token_reduction": None if compared is None else round(compared.token_reduction, 4),
            "step_reduction": None if compared is None else round(compared.step_reduction, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Everything that a table shows; left out are batches that a system could not answer whole."""

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
        latency=Latency.of([run for runs in repeats for run in runs]),
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


PAPER_SOURCE: Final = "RecursiveMAS, arXiv 2604.25917, averages against Recursive-TextMAS"

# By rounds: speed-up, and share of the tokens saved.
PAPER: Final[Mapping[int, tuple[float, float]]] = {
    1: (1.2, 0.346),
    2: (1.9, 0.655),
    3: (2.4, 0.756),
}

_FACTS: Final = ("cpu", "logical_cpus", "memory_bytes", "platform", "python")
_PACKAGES: Final = ("recmas", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """What came of a measurement; if the user interrupted it, what was measured before counts."""

    about: Mapping[str, Any]
    figures: Figures
    problems: tuple[Problem, ...]
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints and `bench.json` holds."""
        return {
            **self.about,
            "questions": self.figures.questions,
            "questions_left_out": self.figures.left_out,
            "repeats": self.figures.repeats,
            "interrupted": self.interrupted,
            "rows": [row.to_json() for row in self.figures.rows],
            "paper": {
                "source": PAPER_SOURCE,
                "rounds": {
                    str(rounds): {"speed_up": speed_up, "token_reduction": reduction}
                    for rounds, (speed_up, reduction) in PAPER.items()
                },
            },
        }

    def to_markdown(self) -> str:
        """Return tables that read well as plain text too."""
        lines = [f"# {self.about['name']}", "", *self._circumstances()]
        if self.interrupted:
            lines.append("- **interrupted: only what ended before counts**")
        if not self.figures.rows:
            return "\n".join([*lines, "", "Nothing was measured."])
        rows = self.figures.rows
        lines += [
            "",
            "## Time and tokens of a question",
            "",
            markdown_table(_HEAD, map(_cells, rows)),
        ]
        if any(row.case.name == LATENT and row.case.rounds in PAPER for row in rows):
            lines += ["", f"paper: {PAPER_SOURCE}; its own models, data and hardware."]
        at = " / ".join(f"p{p}" for p in PERCENTILES)
        lines += [
            "",
            f"## Throughput and latency, batches of {self.about['batch']}",
            "",
            markdown_table(_latency_head(), map(_latency_cells, rows)),
            "",
            f"Times in ms: {at}. A token's is from one to the next, within an answer.",
        ]
        phases = [n for n in rows[0].cost.phases_ms if any(row.cost.phases_ms[n] for row in rows)]
        head = ["system", "rounds", "steps", *(f"{name} ms" for name in phases)]
        cells = ([*_label(row), *(f"{row.cost.phases_ms[n]:.1f}" for n in phases)] for row in rows)
        lines += ["", "## Where the time goes", "", markdown_table(head, cells)]
        asking = [row for row in rows if row.cost.counts["remote_calls"]]
        if asking:
            title = "## Remote models, per question"
            lines += ["", title, "", markdown_table(_REMOTE_HEAD, map(_remote_cells, asking))]
        return "\n".join(lines)

    def _circumstances(self) -> list[str]:
        """Return what the figures hold for, as a list."""
        about, machine, sampling = self.about, self.about["machine"], self.about["sampling"]
        packages = {"python": machine["python"], **machine["packages"]}
        questions = counted(self.figures.questions, "question")
        return [
            f"- {about['date']}, bundle {about['fingerprint'][:12]}",
            f"- {machine['cpu']}, {machine['logical_cpus']} logical CPUs; ran on "
            f"{about['device']} with {counted(about['threads'], 'thread')}",
            "- " + ", ".join(f"{name} {v}" for name, v in packages.items() if v is not None),
            f"- {questions} in batches of {about['batch']}, texts of at most "
            f"{sampling['max_new_tokens']} tokens, temperature {sampling['temperature']:g}",
            f"- median of {counted(self.figures.repeats, 'repeat')} (least to most), "
            f"{about['warmup']} before them to warm up; systems took turns on every batch",
        ]


def run_bench(
    cases: Sequence[Case], settings: BenchSettings, *, threads: int | None, progress: Progress
) -> BenchReport:
    """Measure systems; an interruption by the user ends it and keeps what is measured.

    The first one is that of the bundle that the report is about, loaded with `threads`.

    Raises:
        RecmasError: RM508 for a batch that a baseline cannot run; if nothing could be answered,
            why.
    """
    about = _about(cases[0], settings, threads)
    runs: dict[RunKey, Run] = {}
    interrupted = False
    try:
        measure(cases, settings, runs=runs, progress=progress)
    except KeyboardInterrupt:
        interrupted = True
    found, problems = figures(cases, settings, runs), _left_out(cases, runs)
    if not found.rows and not interrupted:
        raise RecmasError(replace(problem, severity="error") for problem in problems)
    return BenchReport(about=about, figures=found, problems=problems, interrupted=interrupted)


def _about(case: Case, settings: BenchSettings, threads: int | None) -> dict[str, Any]:
    system = case.system
    sampling = settings.sampling
    return {
        "name": system.plan.name,
        "fingerprint": system.manifest.fingerprint,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": system.device,
        "threads": physical_cores() if threads is None else threads,
        "batch": settings.batch,
        "warmup": settings.warmup,
        "sampling": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        },
        "machine": machine_facts(),
    }


def machine_facts() -> dict[str, Any]:
    """Return what figures of time depend on: processor, memory, versions."""
    machine = describe_machine()
    return {
        **{name: machine[name] for name in _FACTS},
        "packages": {name: machine["packages"].get(name) for name in _PACKAGES},
    }


def _left_out(cases: Sequence[Case], runs: Mapping[RunKey, Run]) -> tuple[Problem, ...]:
    """Return one warning for each system that could not answer everything, with its reason."""
    found: dict[int, Problem] = {}
    for (place, _, _), run in sorted(runs.items(), key=lambda item: item[0]):
        for problem in run.problems[:1]:
            message = f"{cases[place].name} of {cases[place].rounds} rounds: {problem.message}"
            found.setdefault(
                place,
                Problem(
                    code=problem.code,
                    message=f"{message}; its batch is left out for all systems",
                    hint=problem.hint,
                    severity="warning",
                ),
            )
    return tuple(found.values())


_HEAD: Final = (
    *("system", "rounds", "steps", "seconds", "speed-up", "paper"),
    *("generated", "tokens saved", "paper", "with latent steps", "prompt", "cut texts"),
)


_REMOTE_HEAD: Final = (
    *("system", "rounds", "steps", "calls", "prompt tokens", "written tokens", "cost"),
)


def _remote_cells(row: Row) -> list[str]:
    calls, prompt, written, cost = (row.cost.counts[name] for name in REMOTE)
    # Models without prices add nothing, and a price of nothing would be no news either.
    price = f"{cost:.3g}" if cost else "no prices"
    return [*_label(row), f"{calls:.1f}", f"{prompt:.0f}", f"{written:.0f}", price]


def _cells(row: Row) -> list[str]:
    cost, compared = row.cost, row.comparison
    paper = PAPER.get(row.case.rounds) if row.case.name == LATENT else None
    texts, cut = cost.counts["texts"], cost.counts["cut_texts"]
    return [
        *_label(row),
        Spread.of(cost.seconds).to_text(".3g"),
        "" if compared is None else compared.speed_up.to_text(".2f", unit=" x"),
        "" if paper is None else f"{paper[0]:.1f} x",
        f"{cost.generated_tokens:.0f}",
        "" if compared is None else f"{compared.token_reduction:.1%}",
        "" if paper is None else f"{paper[1]:.1%}",
        "" if compared is None else f"{compared.step_reduction:.1%}",
        f"{cost.counts['prompt_tokens']:.0f}",
        f"{cut / texts:.0%}" if texts else "",
    ]


def _latency_head() -> list[str]:
    return [
        *("system", "rounds", "steps", "requests/s", "output tokens/s"),
        *("first token ms", "per token ms", "whole ms"),
    ]


def _latency_cells(row: Row) -> list[str]:
    found = row.cost.latency
    times = (found.first_token, found.per_token, found.whole)
    return [
        *_label(row),
        f"{found.requests_per_s:.3g}",
        f"{found.output_tokens_per_s:.3g}",
        *("" if t is None else " / ".join(f"{value:.4g}" for value in t.at) for t in times),
    ]


def _label(row: Row) -> list[str]:
    steps = str(row.case.latent_steps) if row.case.latent_steps else ""
    return [row.case.name, str(row.case.rounds), steps]
