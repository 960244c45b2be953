"""`recmas run`: one question to the terminal, or JSON lines in and out."""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail, missing_package
from recmas_runtime.core.files import refuse_one_file
from recmas_runtime.core.printing import note, write_out
from recmas_runtime.core.progress import LineProgress, Silent
from recmas_runtime.core.text import counted, time_left
from recmas_runtime.formats.bundle import keep_out, open_bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.plan import Plan, SamplingPlan, field_place, is_field
from recmas_runtime.prompts.sampler import check_sampling
from recmas_runtime.running.answer_file import IDENTITY_SUFFIX, AnswerWriter
from recmas_runtime.running.baselines import apply_baseline
from recmas_runtime.running.batch import check_batch
from recmas_runtime.running.records import (
    Answer,
    FailedRecord,
    Record,
    Usage,
    count_records,
    open_records,
    question_record,
    read_records,
    refuse_devices,
)
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter
from recmas_runtime.running.system import System, load
from recmas_runtime.tools.human import terminal_ask

STANDARD_STREAM: Final = "-"
# Phases that most systems do not have.
_SILENT: Final = ("write", "tools", "ask")


def run(options: argparse.Namespace, data: dict[str, Any], problems: list[Problem]) -> None:
    """Answer what the command line asks; raises what concerns the whole run.

    `data` fills as answers come, so that an interruption keeps what is finished. `problems` gets
    what is wrong with single records; the others are answered all the same.
    """
    fields, overrides = check_options(options)
    if options.ray is not None:
        _run_on_ray(options, overrides, data, problems)
        return
    system = load(
        options.bundle,
        device=options.device,
        threads=options.threads,
        ask=terminal_ask(),
        date=options.date,
        cache=options.cache,
    ).baseline(options.baseline)
    sampling = structs.replace(system.plan.sampling, **overrides)
    if options.batch is not None:
        check_batch(options.batch, system.plan)
    try:
        single = None if fields is None else question_record(fields, system.plan.fields)
        if single is not None:
            system.check_question(single)
        if single is not None and not (options.json or options.output or options.trace):
            _stream(system, single, options, sampling)
        else:

            def answer(
                records: Iterator[Record], _: int | None, trace: TraceWriter | None
            ) -> Iterator[Answer | RecmasError]:
                return system.answer_all(
                    records, at_once=options.batch, sampling=sampling, trace=trace
                )

            source = _Source(system.plan, system.manifest.fingerprint, system.prompt_day, answer)
            _Run(source, sampling, options, data, problems).answer_all(single)
    finally:
        problems += system.problems


def _run_on_ray(
    options: argparse.Namespace,
    overrides: dict[str, Any],
    data: dict[str, Any],
    problems: list[Problem],
) -> None:
    """Have the records of a file answered by workers of a cluster."""
    try:
        from recmas_runtime.serve.operation.memory import BundleNeeds
        from recmas_runtime.serve.ray.batch_workers import WorkerSettings, connected
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="ray") from error
    bundle = open_bundle(options.bundle, verify_hashes=False)
    baseline = apply_baseline(bundle.plan, options.baseline, bundle.manifest)
    if baseline.control is not None:
        hint = "Run it without --ray."
        message = f"--baseline {options.baseline} looks at all records, and --ray shares them"
        raise fail("RM506", message, hint=hint)
    plan = baseline.plan
    if options.batch is not None:
        check_batch(options.batch, plan)
    sampling = structs.replace(plan.sampling, **overrides)
    settings = WorkerSettings(
        bundle=options.bundle.resolve(),
        fingerprint=bundle.manifest.fingerprint,
        baseline=options.baseline,
        device=options.device,
        memory_bytes=BundleNeeds.of(bundle).whole_bytes(
            max_batch=options.batch or plan.limits.max_batch, kept_bytes=0
        ),
        threads=options.threads,
        date=options.date,
        cache=options.cache,
    )
    with connected(options.ray or None, settings) as workers:

        def answer(
            records: Iterator[Record], total: int | None, _: TraceWriter | None
        ) -> Iterator[Answer | RecmasError]:
            at_once = options.batch or plan.limits.max_batch
            return workers.answer_all(records, total=total, sampling=sampling, at_once=at_once)

        source = _Source(plan, settings.fingerprint, workers.prompt_day, answer)
        _Run(source, sampling, options, data, problems).answer_all(None)


def check_options(options: argparse.Namespace) -> tuple[dict[str, object] | None, dict[str, Any]]:
    """Refuse what no system could do; return the given fields and settings of sampling.

    Raises:
        RecmasError: RM506 for arguments that contradict each other, RM505 for settings.
    """
    fields = _given_fields(options)
    _check_usage(options, fields)
    overrides = _sampling_overrides(options)
    check_sampling(structs.replace(SamplingPlan(), **overrides))
    return fields, overrides


def _stream(
    system: System, record: Record, options: argparse.Namespace, sampling: SamplingPlan
) -> None:
    """Write one answer as plain text, as it comes."""
    stream = system.stream(record, sampling=sampling)
    try:
        for piece in stream:
            write_out(piece)
    except BaseException:
        with suppress(RecmasError, BrokenPipeError):
            write_out("\n")
        raise
    write_out("\n")
    if stream.answer is not None and not options.quiet:
        note(_summary(stream.answer))


@dataclass(frozen=True)
class _Source:
    """Where answers come from: a system here, or workers of a cluster.

    Attributes:
        prompt_day: The date that prompts show; None if no chat template writes one.
        answer: Yields for each record, in order, what came of it; it gets their number too, if that
            is known.
    """

    plan: Plan
    fingerprint: str
    prompt_day: str | None
    answer: Callable[
        [Iterator[Record], int | None, TraceWriter | None], Iterator[Answer | RecmasError]
    ]


@dataclass
class _Run:
    """A run over records, and what has come of it so far."""

    source: _Source
    sampling: SamplingPlan
    options: argparse.Namespace
    data: dict[str, Any]
    problems: list[Problem]
    num_answers: int = 0
    num_failed: int = 0
    num_resumed: int = 0

    def answer_all(self, single: Record | None) -> None:
        """Answer records as there is room for them; each is written once those before it are."""
        options = self.options
        start = time.perf_counter()
        with ExitStack() as stack:
            found, total = self._records(stack, single)
            writer = self._open_writer(stack)
            trace = None
            if options.trace is not None:
                trace = stack.enter_context(
                    TraceWriter(
                        options.trace,
                        resume=options.resume,
                        force=options.force,
                        thoughts=options.thoughts or 0,
                    )
                )
            if options.json:
                self.data["answers"] = []
            # A progress line would run into answers on the same terminal.
            quiet = options.quiet or not (options.json or options.output)
            progress = Silent() if quiet else LineProgress()
            advance = stack.enter_context(progress.stage("Answered", total))
            for result in self._results(found, total, writer, trace):
                if result is None:
                    self.num_resumed += 1
                else:
                    self._deliver(result, writer)
                seen = self.num_answers + self.num_failed + self.num_resumed
                done = seen - self.num_resumed
                left = None if total is None else max(0, total - seen)
                advance(1, note=self._note(done, left, time.perf_counter() - start))
        if not options.quiet and single is None:
            seconds = time.perf_counter() - start
            counts = "".join(f", {count}" for count in self._other_counts())
            note(f"answered {counted(self.num_answers, 'record')} in {seconds:.1f} s{counts}")

    def _results(
        self,
        found: Iterator[Record | FailedRecord],
        total: int | None,
        writer: AnswerWriter | None,
        trace: TraceWriter | None,
    ) -> Iterator[Answer | FailedRecord | None]:
        """Yield what came of each record in the order of the input; None for what is there."""
        # What was read and is not answered yet, in order, and between records what needs no run.
        begun: deque[Record | FailedRecord | None] = deque()

        def asked() -> Iterator[Record]:
            for item in found:
                is_there = isinstance(item, Record) and writer and writer.is_finished(item)
                begun.append(None if is_there else item)
                if isinstance(item, Record) and not is_there:
                    yield item

        for result in self.source.answer(asked(), total, trace):
            while not isinstance(item := begun.popleft(), Record):
                yield item
            if isinstance(result, RecmasError):
                problem = result.problems[0]
                yield FailedRecord(id=item.id, record=item.given, problem=problem)
            else:
                yield result
        for item in begun:
            assert not isinstance(item, Record), "every record has a result"
            yield item

    def _deliver(self, result: Answer | FailedRecord, writer: AnswerWriter | None) -> None:
        options = self.options
        if options.json:
            self.data["answers"].append(result.to_json())
        if writer is not None:
            writer.write(result)
        if isinstance(result, FailedRecord):
            self.num_failed += 1
            self.problems.append(result.problem)
            return
        self.num_answers += 1
        if writer is None and not options.json:  # one question, with a trace
            write_out(f"{result.answer}\n")
        if options.input is None and not options.quiet:
            note(_summary(result))

    def _records(
        self, stack: ExitStack, single: Record | None
    ) -> tuple[Iterator[Record | FailedRecord], int | None]:
        """Return what to answer, and how many there are, if that can be known."""
        options, fields = self.options, self.source.plan.fields
        if single is not None:
            return iter([single]), 1
        if options.input == STANDARD_STREAM:
            refuse_devices(sys.stdin.buffer, "<stdin>")
            return read_records(sys.stdin.buffer, file="<stdin>", fields=fields), None
        stream = stack.enter_context(open_records(options.input))
        total = count_records(stream, options.input)
        return read_records(stream, file=options.input, fields=fields), total

    def _open_writer(self, stack: ExitStack) -> AnswerWriter | None:
        options = self.options
        to_stdout = options.output == STANDARD_STREAM
        if options.output is not None and not to_stdout:
            identity = {
                "bundle": self.source.plan.name,
                "fingerprint": self.source.fingerprint,
                "baseline": options.baseline,
                "sampling": to_json(self.sampling),
                "date": self.source.prompt_day,
            }
            path = Path(options.output)
            return stack.enter_context(
                AnswerWriter(path, identity=identity, resume=options.resume, force=options.force)
            )
        if to_stdout or (options.input is not None and not options.json):
            return stack.enter_context(AnswerWriter(None))
        return None

    def _other_counts(self) -> list[str]:
        counts = {"failed": self.num_failed, "there already": self.num_resumed}
        return [f"{count} {what}" for what, count in counts.items() if count]

    def _note(self, done: int, left: int | None, seconds: float) -> str:
        """Return what stands beside the count: other counts, the rate, the time left."""
        parts = self._other_counts()
        if done and seconds > 0:
            parts.append(f"{done / seconds:.2g}/s")
            if left:
                parts.append(f"{time_left(left * seconds / done)} left")
        return ", ".join(parts)


def _summary(answer: Answer) -> str:
    """Return one line on what an answer took."""
    usage, ms = answer.usage, answer.timing_ms
    phases = {name: value for name, value in asdict(ms).items() if name not in _SILENT or value}
    times = ", ".join(f"{phase} {value / 1e3:.2f} s" for phase, value in phases.items())
    handed_over = f"{usage.handover_tokens} hand-over tokens, " if usage.handover_tokens else ""
    return (
        f"[{answer.finish_reason}] {counted(answer.rounds, 'round')}, "
        f"{usage.prompt_tokens} prompt tokens, {usage.latent_steps} latent steps, {handed_over}"
        f"{usage.completion_tokens} answer tokens{_remote(usage)} | {times}"
    )


def _remote(usage: Usage) -> str:
    """Return what remote models took; nothing where none was asked."""
    told = ""
    for model, took in usage.remote.items():
        cost = "" if took.cost is None else f", cost {took.cost:.3g}"
        told += (
            f"; {model}: {counted(took.calls, 'call')}, {took.prompt_tokens} prompt tokens, "
            f"{took.completion_tokens} written{cost}"
        )
    return told


def _given_fields(options: argparse.Namespace) -> dict[str, object] | None:
    """Return the fields of the one record that the command line gives; None if it gives none.

    A name that is given several times is a list; so is one whose entries are given, in order.
    """
    fields: dict[str, object] = {}
    for text in options.fields or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise fail("RM506", f"--field {text!r} is not NAME=VALUE", hint=_HELP)
        before = fields.get(name)
        if is_field(name) and (place := field_place(name)).entry is not None:
            entries = fields.setdefault(place.name, [])
            if not isinstance(entries, list) or len(entries) != place.entry:
                message = f"--field {text!r} does not give the next entry of {place.name!r}"
                raise fail(
                    "RM506",
                    message,
                    hint=f"Begin with --field '{place.name}[0]'=... and go on from there.",
                )
            entries.append(value)
        elif before is None:
            fields[name] = value
        else:
            fields[name] = [*(before if isinstance(before, list) else [before]), value]
    if options.question is not None:
        if "question" in fields:
            raise fail("RM506", "the question is given twice", hint=_HELP)
        fields["question"] = options.question
    return fields or None


_HELP: Final = "See `recmas run --help`."


def _check_usage(options: argparse.Namespace, fields: Mapping[str, object] | None) -> None:
    """Refuse arguments that contradict each other."""
    single, source, target = fields is not None, options.input, options.output
    to_file = target not in (None, STANDARD_STREAM)
    wrong = {
        "give a QUESTION or --input, not both": single and source is not None,
        "give a QUESTION, --field or --input": not single and source is None,
        "--json already prints the answers on stdout": options.json and target == STANDARD_STREAM,
        "--resume needs --output FILE": options.resume and not to_file,
        "--thoughts needs --trace DIR": options.thoughts is not None and options.trace is None,
        "give --resume or --force, not both": options.resume and options.force,
        "--ray needs --input": options.ray is not None and source is None,
        "--ray writes no --trace": options.ray is not None and options.trace is not None,
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise fail("RM506", message, hint=_HELP)
    keep_out(options.bundle, {"--output": target if to_file else None, "--trace": options.trace})
    # Where a run reads and where it writes, none of which may be one file.
    # Standard input and output are told by their descriptors.
    is_told = target is not None or single or options.json
    to_stdout = target == STANDARD_STREAM or not is_told
    places: dict[str, str | int | None] = {
        "--input": 0 if source == STANDARD_STREAM else source,
        "--output": 1 if to_stdout else target,
    }
    if to_file:
        places["--output's identity"] = f"{target}{IDENTITY_SUFFIX}"
    if options.trace is not None:
        places[f"--trace ({RECORDS_NAME})"] = str(options.trace / RECORDS_NAME)
    refuse_one_file(places, hint=_HELP)


def _sampling_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings that were given, by their names in `SamplingPlan`."""
    given = {name: getattr(options, name) for name in SamplingPlan.__struct_fields__}
    if options.stop is not None:
        given["stop"] = tuple(options.stop)
    return {name: value for name, value in given.items() if value is not None}
