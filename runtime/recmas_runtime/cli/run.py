"""`recmas run`: one question to the terminal, or JSON lines in and out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.progress import LineProgress, Silent
from recmas_runtime.core.terminal import shown_on
from recmas_runtime.core.text import counted
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.prompts.sampler import check_sampling
from recmas_runtime.running.records import (
    Answer,
    AnswerWriter,
    Record,
    question_record,
    read_records,
    unreadable,
    usable,
)
from recmas_runtime.running.run_trace import TraceWriter
from recmas_runtime.running.system import System, check_batch, load
from recmas_runtime.tools.toolbox import terminal_ask

STANDARD_STREAM: Final = "-"
# Phases that most systems do not have.
_SILENT: Final = ("write", "tools")


def run(options: argparse.Namespace, data: dict[str, Any], problems: list[Problem]) -> None:
    """Answer what the command line asks; raises what concerns the whole run.

    `data` fills as answers come, so that an interruption keeps what is finished. `problems` gets
    what is wrong with single records; the others are answered all the same.
    """
    _check_usage(options)
    overrides = _sampling_overrides(options)
    check_sampling(structs.replace(SamplingPlan(), **overrides))  # before anything takes long
    system = load(
        options.bundle, device=options.device, threads=options.threads, ask=terminal_ask()
    ).baseline(options.baseline)
    sampling = structs.replace(system.plan.sampling, **overrides)
    if options.batch is not None:
        check_batch(options.batch, system.plan)
    try:
        if options.question is not None and not (options.json or options.output or options.trace):
            _stream(system, options, sampling)
        else:
            _answer_all(system, options, sampling, data, problems)
    finally:
        problems += system.problems


def _stream(system: System, options: argparse.Namespace, sampling: SamplingPlan) -> None:
    """Write one answer as plain text, as it comes."""
    record = question_record(options.question, system.plan.fields)
    stream = system.stream(record, sampling=sampling)
    try:
        for piece in stream:
            sys.stdout.write(shown_on(sys.stdout, piece))
            sys.stdout.flush()
    finally:
        print(flush=True)
    if stream.answer is not None and not options.quiet:
        print(_summary(stream.answer), file=sys.stderr)


def _answer_all(
    system: System,
    options: argparse.Namespace,
    sampling: SamplingPlan,
    data: dict[str, Any],
    problems: list[Problem],
) -> None:
    """Answer records in batches; every finished batch is written before the next begins."""
    batch_size = options.batch or system.plan.limits.max_batch
    start = time.perf_counter()
    num_answers = 0
    with ExitStack() as stack:
        trace = None
        if options.trace is not None:
            trace = stack.enter_context(closing(TraceWriter(options.trace)))
        records = _records(stack, system, options, problems)
        writer = _open_writer(options)
        if writer is not None:
            stack.enter_context(closing(writer))
            records = (record for record in records if record.id not in writer.finished)
        if options.json:
            data["answers"] = []
        # A progress line would run into answers on the same terminal.
        quiet = options.quiet or not (options.json or options.output)
        progress = Silent() if quiet else LineProgress()
        advance = stack.enter_context(progress.stage("Answered"))
        while batch := list(islice(records, batch_size)):
            for result in system.run_batch(batch, sampling=sampling, trace=trace):
                if isinstance(result, RecmasError):
                    problems += result.problems
                    continue
                num_answers += 1
                _deliver(result, options, writer, data)
            advance(len(batch))
    if not options.quiet and options.question is None:
        seconds = time.perf_counter() - start
        print(f"answered {num_answers} records in {seconds:.1f} s", file=sys.stderr)


def _deliver(
    answer: Answer, options: argparse.Namespace, writer: AnswerWriter | None, data: dict[str, Any]
) -> None:
    if writer is not None:
        writer.write(answer)
    if options.json:
        data["answers"].append(answer.to_json())
    elif writer is None:  # one question, with a trace
        print(shown_on(sys.stdout, answer.answer), flush=True)
    if options.question is not None and not options.quiet:
        print(_summary(answer), file=sys.stderr)


def _summary(answer: Answer) -> str:
    """Return one line on what an answer took."""
    usage, ms = answer.usage, answer.timing_ms
    phases = {name: value for name, value in asdict(ms).items() if name not in _SILENT or value}
    times = ", ".join(f"{phase} {value / 1e3:.2f} s" for phase, value in phases.items())
    handed_over = f"{usage.handover_tokens} hand-over tokens, " if usage.handover_tokens else ""
    return (
        f"[{answer.finish_reason}] {counted(answer.rounds, 'round')}, "
        f"{usage.prompt_tokens} prompt tokens, {usage.latent_steps} latent steps, {handed_over}"
        f"{usage.completion_tokens} answer tokens | {times}"
    )


def _records(
    stack: ExitStack, system: System, options: argparse.Namespace, problems: list[Problem]
) -> Iterator[Record]:
    """Return the records to answer; what cannot be used goes to `problems`."""
    fields = system.plan.fields
    if options.question is not None:
        return iter([question_record(options.question, fields)])
    if options.input == STANDARD_STREAM:
        return usable(read_records(sys.stdin.buffer, file="<stdin>", fields=fields), problems)
    try:
        stream = stack.enter_context(Path(options.input).open("rb"))  # noqa: SIM115
    except OSError as error:
        raise unreadable(options.input, error) from error
    return usable(read_records(stream, file=options.input, fields=fields), problems)


def _open_writer(options: argparse.Namespace) -> AnswerWriter | None:
    if options.output is not None and options.output != STANDARD_STREAM:
        return AnswerWriter(Path(options.output), resume=options.resume)
    if options.output == STANDARD_STREAM or (options.question is None and not options.json):
        return AnswerWriter(None)
    return None


def _check_usage(options: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other."""
    wrong = {
        "give a QUESTION or --input, not both": options.question is not None
        and options.input is not None,
        "give a QUESTION or --input": options.question is None and options.input is None,
        "--json already prints the answers on stdout": options.json
        and options.output == STANDARD_STREAM,
        "--resume needs --output FILE": options.resume
        and options.output in (None, STANDARD_STREAM),
        "--input and --output are the same file": _same_file(options.input, options.output),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise fail("RM506", message, hint="See `recmas run --help`.")


def _same_file(source: str | None, target: str | None) -> bool:
    if source is None or target is None or STANDARD_STREAM in (source, target):
        return False
    return Path(source).resolve() == Path(target).resolve()


def _sampling_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling settings that were given, by their names in `SamplingPlan`."""
    given = {name: getattr(options, name) for name in SamplingPlan.__struct_fields__}
    if options.stop is not None:
        given["stop"] = tuple(options.stop)
    return {name: value for name, value in given.items() if value is not None}
