"""`recmas report`: the trace of a run as one HTML file that needs nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from recmas_runtime.cli.thoughts import checked, trace_lines
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import reason_of, whole_file
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.text import counted
from recmas_runtime.formats.codec import Finite, Size, to_json
from recmas_runtime.sequences.thoughts import RecordReadings
from recmas_runtime.serve.page.assets import REPORT_SCRIPTS, asset, report_policy

# Of a question or an answer in the list of records, which is searched as a whole.
_MOST_CHARACTERS: Final = 20_000


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
        size = self.size_bytes / 2**20
        return f"{self.file}: {counted(self.records, 'record')}, {size:.1f} MiB"


def write_report(
    folder: Path,
    output: Path,
    *,
    answers: Path | None = None,
    record: str | None = None,
    force: bool = False,
) -> WrittenReport:
    """Write what a trace holds as a page for browsers.

    Args:
        answers: Output of the same run: its questions and answers are shown beside the trace.
        record: The id of the only record to write.
        force: Write over what is there.

    Raises:
        RecmasError: RM502 for a trace or answers that cannot be read, RM503 if the report cannot be
            written, RM506 if there is no such record, RM520 if the file is there.
    """
    if os.path.lexists(output) and not (force and output.is_file()):
        what = "another file, or write over it with --force" if output.is_file() else "a file"
        raise fail("RM520", "it exists already", file=str(output), hint=f"Name {what}.")
    told = {} if answers is None else _answers(answers)
    count = 0
    try:
        with whole_file(output) as file:
            for count, piece in _pieces(folder, told, record):  # noqa: B007
                file.write(piece.encode("utf-8", "backslashreplace"))
            size = file.tell()
    except OSError as error:
        raise fail(
            "RM503",
            f"the report cannot be written: {reason_of(error)}",
            file=str(output),
            hint="Give --output a file in a folder that is there, with room.",
        ) from error
    return WrittenReport(file=str(output), records=count, size_bytes=size)


def _pieces(
    folder: Path, told: Mapping[str, dict[str, str]], record: str | None
) -> Iterator[tuple[int, str]]:
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
        index.append({"id": line.id, "note": _note(line), **told.get(str(line.id), {})})
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


def _answers(path: Path) -> dict[str, dict[str, str]]:
    """Return question and answer, or error, by the record's id as text."""
    told = {}
    try:
        for line in read_json_lines(path):
            if not isinstance(line, dict) or "id" not in line:
                raise ValueError("a line is no answer of `recmas run`")
            error = line.get("error")
            told[str(line["id"])] = {
                "question": _fields(line.get("record"))[:_MOST_CHARACTERS],
                "answer": str(line.get("answer") or "")[:_MOST_CHARACTERS],
                "error": str(error.get("message", "")) if isinstance(error, dict) else "",
            }
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise _no_answers(path, reason) from error
    return told


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
