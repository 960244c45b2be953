"""`recmas report`: the trace of a run as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from recmas_runtime.cli.thoughts import checked, trace_lines
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import reason_of, refuse_one_file, whole_file
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.printing import write_out
from recmas_runtime.core.text import counted, human_bytes
from recmas_runtime.formats.bundle import keep_out_of_any
from recmas_runtime.formats.codec import Finite, Size, to_json
from recmas_runtime.running.answer_file import IDENTITY_SUFFIX
from recmas_runtime.running.run_trace import RECORDS_NAME, is_trace_file
from recmas_runtime.sequences.thoughts import RecordReadings
from recmas_runtime.serve.page.assets import REPORT_SCRIPTS, asset, report_policy

# Of a question or an answer in the list of records, which is searched as a whole.
_MOST_CHARACTERS: Final = 20_000
_STDOUT: Final = "-"


class _Call(msgspec.Struct, frozen=True):
    """Of a call of a tool, what the report shows."""

    name: str
    argument: str
    status: str
    result: str


class _Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of a step in a trace, what the report shows."""

    op: str
    round: Size
    agents: tuple[str, ...]
    ms: Finite
    prefilled_tokens: Size = 0
    reused_tokens: Size = 0
    written_tokens: Size = 0
    handed_rows: Size | None = None
    handed_bytes: Size | None = None
    texts: tuple[str, ...] = ()
    tool_calls: tuple[_Call, ...] = ()


class _Line(msgspec.Struct, frozen=True):
    """Of a line of a trace, what the report shows."""

    id: str | int
    batch_size: Size
    steps: tuple[_Step, ...]
    thoughts: Any = ()
    messages: Any = ()


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """What was written where."""

    file: str
    records: int
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return asdict(self)

    @property
    def text(self) -> str:
        """What is printed: the file, and how much is in it."""
        name = "<stdout>" if self.file == _STDOUT else self.file
        return f"{name}: {counted(self.records, 'record')}, {human_bytes(self.size_bytes)}"


def write_report(
    folder: Path,
    output: Path,
    *,
    answers: Path | None = None,
    record: str | None = None,
    force: bool = False,
    problems: list[Problem] | None = None,
    as_json: bool = False,
) -> WrittenReport:
    """Write what a trace holds as a page for browsers.

    Args:
        output: A file; `-` is standard output.
        answers: Output of the same run: its questions and answers are shown beside the trace.
        record: The id of the only record to write.
        force: Write over what is there.
        problems: Gets a warning if the answers are not those of the trace.
        as_json: Standard output has another use.

    Raises:
        RecmasError: RM502 for a trace or answers that cannot be read, RM503 if the report cannot be
            written, RM506 if there is no such record or the output is a file that is read or
            belongs to a trace or a bundle, RM520 if the file is there.
    """
    to_stdout = str(output) == _STDOUT
    _check_places(folder, output, answers, to_stdout=to_stdout)
    if to_stdout and as_json:
        raise fail("RM506", "--json has standard output already", hint="Give --output a file.")
    if not to_stdout and os.path.lexists(output) and not (force and output.is_file()):
        what = "another file, or write over it with --force" if output.is_file() else "a file"
        raise fail("RM520", "it exists already", file=str(output), hint=f"Name {what}.")
    told = None if answers is None else _Answers(answers)
    count = size = 0
    try:
        with nullcontext() if to_stdout else whole_file(output) as file:
            for count, piece in _pieces(folder, told, record):  # noqa: B007
                data = piece.encode("utf-8", "backslashreplace")
                size += len(data)
                if file is None:
                    write_out(data.decode())
                else:
                    file.write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise fail(
            "RM503",
            f"the report cannot be written: {reason_of(error)}",
            file=str(output),
            hint="Give --output a file in a folder that is there, with room.",
        ) from error
    if told is not None and problems is not None:
        problems += told.warnings()
    return WrittenReport(file=str(output), records=count, size_bytes=size)


def _check_places(folder: Path, output: Path, answers: Path | None, *, to_stdout: bool) -> None:
    """Refuse to write over what is read, and over files of a trace or a bundle."""
    hint = "Give --output another file."
    places: dict[str, str | int | None] = {
        f"the trace ({RECORDS_NAME})": str(folder / RECORDS_NAME),
        "--answers": None if answers is None else str(answers),
        "--answers' identity": None if answers is None else f"{answers}{IDENTITY_SUFFIX}",
        "--output": 1 if to_stdout else str(output),
    }
    refuse_one_file(places, hint=hint)
    if to_stdout:
        return
    keep_out_of_any("--output", output)
    if is_trace_file(output.name) and (output.parent / RECORDS_NAME).is_file():
        raise fail("RM506", f"--output {output} is a file of a trace", hint=hint)


def _pieces(folder: Path, told: _Answers | None, record: str | None) -> Iterator[tuple[int, str]]:
    """Yield the file piece by piece, each with the number of records so far."""
    style, script = asset("style.css"), "\n".join(map(asset, REPORT_SCRIPTS))
    head, tail = asset("report.html").split("@data@")
    title = _escaped(f"Report: {folder.resolve().name}")
    head = head.replace("@title@", title).replace("@policy@", report_policy(style, script))
    yield 0, head.replace("@style@", style)
    index: list[dict[str, Any]] = []
    for number, data in trace_lines(folder):
        if record is not None and str(data.get("id")) != record:
            continue
        line = checked(_Line, data, folder, number)
        readings = {"thoughts": line.thoughts, "messages": line.messages}
        read = checked(RecordReadings, readings, folder, number)
        index.append({"id": line.id, "note": _note(line), **(told.beside(line) if told else {})})
        trace = {"steps": to_json(line.steps), **to_json(read)}
        yield len(index), _data(f"trace-{len(index)}", trace)
    if not index:
        what = "no records" if record is None else f"no record {record!r}"
        hint = "Records without an answer have no trace."
        raise fail("RM506", f"the trace holds {what}", file=str(folder), hint=hint)
    yield len(index), _data("index", index) + tail.replace("@script@", script)


def _note(line: _Line) -> str:
    total = counted(len(line.steps), "step")
    if line.batch_size < 2:
        return total
    return f"{total}; times are those of the {line.batch_size} records that ran together"


def _data(name: str, value: object) -> str:
    """Return data as an element that no browser runs and no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _escaped(text: str) -> str:
    marks = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
    return "".join(marks.get(character, character) for character in text)


class _Usage(msgspec.Struct, frozen=True):
    """Of what an answer took, what its trace has too."""

    prompt_tokens: Size
    handover_tokens: Size


class _Told(msgspec.Struct, frozen=True):
    """Of an answer, what its trace has too."""

    rounds: Size
    batch_size: Size
    usage: _Usage
    timing_ms: dict[str, Finite]


class _Answers:
    """Questions and answers of a run, and how far they are those of a trace.

    Raises:
        RecmasError: RM502 if they cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._told: dict[str, dict[str, str]] = {}
        self._took: dict[str, _Told] = {}
        # Of records of the trace, by their ids: those without an answer, and what differs.
        self._missing: list[str | int] = []
        self._others: dict[str | int, str] = {}
        try:
            for line in read_json_lines(path):
                if not isinstance(line, dict) or "id" not in line:
                    raise ValueError("a line is no answer of `recmas run`")
                self._add(line)
        except (OSError, ValueError, RecursionError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise _no_answers(path, reason) from error

    def _add(self, line: Mapping[str, Any]) -> None:
        name, error = str(line["id"]), line.get("error")
        self._told[name] = {
            "question": _fields(line.get("record"))[:_MOST_CHARACTERS],
            "answer": str(line.get("answer") or "")[:_MOST_CHARACTERS],
            "error": str(error.get("message", "")) if isinstance(error, dict) else "",
        }
        # What others have written or changed is shown all the same.
        with suppress(msgspec.ValidationError):
            self._took[name] = msgspec.convert(line, _Told)

    def beside(self, line: _Line) -> dict[str, str]:
        """Return what is shown beside a record of the trace."""
        name = str(line.id)
        told = self._told.get(name)
        if told is None or told["error"]:
            self._missing.append(line.id)
        elif name in self._took and (other := _difference(self._took[name], line)):
            self._others[line.id] = other
            return {
                **(told or {}),
                "note": f"{_note(line)}; the answer is of another run ({other})",
            }
        return {} if told is None else told

    def warnings(self) -> list[Problem]:
        """Return what is said of records whose answers are missing or those of another run."""
        messages = []
        if self._missing:
            total = counted(len(self._missing), "record")
            messages.append(
                f"{total} of the trace without an answer here: first {_first(self._missing)}"
            )
        if self._others:
            total = counted(len(self._others), "answer")
            first = _first(self._others)
            other = next(iter(self._others.values()))
            messages.append(f"{total} of another run than the trace: first {first}, {other}")
        return [
            Problem(
                code="RM552",
                severity="warning",
                message=message,
                file=str(self._path),
                hint="Name the file that the run with this --trace has written.",
            )
            for message in messages
        ]


def _first(ids: Iterable[str | int]) -> str:
    return f"record {next(iter(ids))!r}"


def _difference(told: _Told, line: _Line) -> str:
    """Return what an answer and a record's trace of one run cannot differ in; empty if nothing."""
    last = max((step.round for step in line.steps), default=0)
    # Rounds that only the record's neighbours needed are not among what its answer took.
    ran = [step for step in line.steps if step.round < told.rounds or step.round == last]
    prompt = sum(step.prefilled_tokens for step in ran)
    if any(step.tool_calls for step in ran):  # whose results the answer counts, and no step
        prompt = max(prompt, told.usage.prompt_tokens)
    pairs: dict[str, tuple[int | float, int | float]] = {
        "records that ran together": (told.batch_size, line.batch_size),
        "prompt tokens": (told.usage.prompt_tokens, prompt),
        "hand-over tokens": (
            told.usage.handover_tokens,
            sum(step.written_tokens for step in ran),
        ),
    }
    for what, (here, there) in pairs.items():
        if here != there:
            return f"{what}: {here} here, {there} there"
    for op, ms in told.timing_ms.items():
        times = [step.ms for step in line.steps if step.op == op]
        # Each is rounded to a thousandth.
        if op != "total" and abs(ms - sum(times)) > 1e-3 * (len(times) + 1):
            return f"time of {op}: {ms:.1f} ms here, {sum(times):.1f} ms there"
    return ""


def _fields(record: object) -> str:
    """Return the fields of a record as text: the question alone, or each behind its name."""
    if not isinstance(record, dict):
        return ""
    fields = {name: value for name, value in record.items() if name not in ("id", "answer")}
    if list(fields) == ["question"]:
        return str(fields["question"])
    return "\n".join(f"{name}: {value}" for name, value in fields.items())


def _no_answers(path: Path, reason: str) -> RecmasError:
    return fail(
        "RM502",
        f"the answers cannot be read: {reason}",
        file=str(path),
        hint="Name the file that `recmas run --output FILE` has written.",
    )
