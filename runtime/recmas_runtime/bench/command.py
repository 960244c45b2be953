"""`bench`: a bundle beside its baselines, on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from msgspec import structs

from recmas_runtime.bench.measure import TEXT, BenchSettings, make_cases
from recmas_runtime.bench.report import BenchReport, run_bench
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.tables import FORMATS
from recmas_runtime.core.text import listed
from recmas_runtime.formats.bundle import keep_out, write_json_atomic
from recmas_runtime.formats.plan import Plan, filled_fields
from recmas_runtime.prompts.sampler import check_sampling
from recmas_runtime.running.batch import check_batch
from recmas_runtime.running.records import (
    Record,
    open_records,
    question_record,
    read_records,
    usable,
)
from recmas_runtime.running.system import System, load

# What is asked if neither data nor questions are given, one a line.
QUESTIONS: Final = tuple(
    Path(__file__).with_name("questions.txt").read_text(encoding="ascii").splitlines()
)
JSON_NAME: Final = "bench.json"
MARKDOWN_NAME: Final = "bench.md"


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the command line asks for; no baselines stand for `text`, no limit for all records.

    The untrained bundle is one of the same spec; without threads, engines take the physical cores.
    """

    bundle: Path
    data: str | None
    questions: Sequence[str]
    limit: int | None
    baselines: Sequence[str]
    untrained_bundle: Path | None
    batch: int
    max_new_tokens: int | None
    warmup: int
    repeats: int
    device: str
    threads: int | None
    out: Path | None
    cache: bool = True


@dataclass(frozen=True, kw_only=True)
class Forms:
    """A bundle's system in different rounds, beside which baselines run, and latent steps."""

    by_rounds: tuple[System, ...]
    by_steps: tuple[System, ...] = ()


def as_built(_: Path, system: System) -> Forms:
    """Return the one form that a bundle was built in."""
    return Forms(by_rounds=(system,))


def bench(
    options: BenchOptions,
    problems: list[Problem],
    *,
    forms_of: Callable[[Path, System], Forms] = as_built,
    progress: Progress,
) -> BenchReport:
    """Measure what the command line asks for.

    `problems` gets lines of the data that cannot be used, questions without an answer, and warnings
    about the engines of either bundle.

    Raises:
        RecmasError: RM506 for options that make no sense, RM502 or RM503 for files, RM508 for a
            baseline that does not fit, and what loading raises.
    """
    _check_usage(options)
    for root in (options.bundle, options.untrained_bundle):
        if root is not None:
            keep_out(root, {"--out": options.out})
    make_folder(options.out)
    device, threads, cache = options.device, options.threads, options.cache
    system = load(options.bundle, device=device, threads=threads, cache=cache)
    loaded = [system]
    forms = forms_of(options.bundle, system)
    untrained: tuple[System, ...] = ()
    if options.untrained_bundle is not None:
        other = load(options.untrained_bundle, device=device, threads=threads, cache=cache)
        loaded.append(other)
        untrained = forms_of(options.untrained_bundle, other).by_rounds
    plans = [form.plan for form in (*forms.by_rounds, *forms.by_steps)]
    fields = tuple(dict.fromkeys(name for plan in plans for name in plan.fields))
    settings = _settings(system.plan, options, _gather_records(options, fields, problems))
    report = run_bench(
        make_cases(
            forms.by_rounds,
            baselines=options.baselines or (TEXT,),
            sweep=forms.by_steps,
            untrained=untrained,
        ),
        settings,
        threads=options.threads,
        progress=progress,
    )
    # What both bundles lack is said once.
    warnings = dict.fromkeys(problem for system in loaded for problem in system.problems)
    problems += (*report.problems, *warnings)
    if options.out is not None:
        with writing(options.out):
            write_json_atomic(options.out / JSON_NAME, report.to_json())
            text = report.to_markdown() + "\n"
            (options.out / MARKDOWN_NAME).write_text(text, encoding="utf-8")
    return report


def _check_usage(options: BenchOptions) -> None:
    """Refuse options that make no sense, before anything takes long."""
    wrong = {
        "give --data or --question, not both": options.data is not None and options.questions,
        f"--warmup {options.warmup} is not 0 or more": options.warmup < 0,
        f"--repeats {options.repeats} is not 1 or more": options.repeats < 1,
        f"--limit {options.limit} is not 1 or more": options.limit is not None
        and options.limit < 1,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise fail("RM506", message, hint="See `--help`.")


def _gather_records(
    options: BenchOptions, fields: Sequence[str], problems: list[Problem]
) -> tuple[Record, ...]:
    """Return what to ask; lines that cannot be used go to `problems`."""
    data = options.data
    if data is None:
        others = [name for name in fields if name != "question"]
        if others or not fields:
            uses = f"use {listed(fields)}" if fields else "show nothing of a record"
            raise fail(
                "RM506",
                f"the prompts of this bundle {uses}, and a question alone does not fill them",
                hint=f"Give --data FILE with a record such as "
                f"{json.dumps(filled_fields(fields, '...'))} in each line.",
            )
        texts = (options.questions or QUESTIONS)[: options.limit]
        return tuple(question_record(text, fields, index=i) for i, text in enumerate(texts))
    with open_records(data) as stream:
        found = usable(read_records(stream, file=data, fields=fields), problems)
        records = tuple(islice(found, options.limit))
    if not records:
        raise fail(
            "RM506",
            "the data has no question to ask",
            file=data,
            hint=f"Give --data {FORMATS}, with {listed(fields)} in each record.",
        )
    return records


def _settings(plan: Plan, options: BenchOptions, records: tuple[Record, ...]) -> BenchSettings:
    check_batch(options.batch, plan)
    sampling = plan.sampling
    if options.max_new_tokens is not None:
        sampling = structs.replace(sampling, max_new_tokens=options.max_new_tokens)
    check_sampling(sampling)
    return BenchSettings(
        records=records,
        batch=options.batch,
        warmup=options.warmup,
        repeats=options.repeats,
        sampling=sampling,
    )


def make_folder(out: Path | None) -> None:
    """Make the folder of a report before anything takes long; RM503 if that is not possible."""
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raise RM503 for what the file system refuses of a report."""
    try:
        yield
    except OSError as error:
        raise fail(
            "RM503",
            f"the report cannot be written: {reason_of(error)}",
            file=str(out),
            hint="Give --out a folder with room that you may write to.",
        ) from error
