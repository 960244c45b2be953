"""Data files: records of our own form or of the form that a data set is published in."""

from __future__ import annotations

import hashlib
import random
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from recmas_compiler.evaluation.data.converters import CONVERTERS, LEAVES_OUT, UNREADABLE
from recmas_compiler.evaluation.data.protocol import DataSection, Protocol
from recmas_compiler.evaluation.data.readers import READERS, NeedsQuestionsError, Published
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.tables import FORMATS, Row, read_rows
from recmas_runtime.core.text import counted
from recmas_runtime.formats.plan import field_place
from recmas_runtime.prompts.render import field_text
from recmas_runtime.running.records import Record

# A file with one mistake often has it in every line.
MAX_PROBLEMS: Final = 10


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record that prompts may show, and what only the check sees: `answer`, unit tests.

    Attributes:
        file: Where it was read, for messages.
        line: Its line there, from 1.
    """

    record: Record
    gold: Mapping[str, object]
    file: str | None = field(default=None, compare=False)
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The questions of an evaluation in the order of the file, and the file's sha256.

    Attributes:
        left_out: How many records are no questions of the protocol, by reason; they count among
            the file's records and are not chosen from.
    """

    questions: tuple[Question, ...]
    num_records: int
    digest: str
    left_out: Mapping[str, int] = field(default_factory=dict)


def load_data(
    path: Path, protocol: Protocol, *, shown: tuple[str, ...], beside: Path | None = None
) -> DataSet:
    """Read a data file as a protocol says.

    Args:
        path: JSON lines, a JSON list, CSV or Parquet (needs pyarrow), also gzipped; or the form
            that the protocol's reader knows.
        shown: Fields that the bundle's prompts show in a place of their own.
        beside: The file with the questions, for data sets that are published without them.

    Raises:
        RecmasError: RM502 if the file cannot be read, RM201 if Parquet needs a package, RM601 with
            the line of every selected record that does not fit the protocol.
    """
    rows = list(rows_of(path, protocol.data, beside))
    reasons = [_reason_to_leave_out(row, protocol.data) for row in rows]
    left_out = Counter(reason for reason in reasons if reason is not None)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    questions: list[Question] = []
    problems: list[Problem] = []
    lines: dict[str | int, int] = {}
    for index in _selected(kept, protocol):
        row = rows[index]
        try:
            question = _question(row, index=index, data=protocol.data, shown=shown, file=str(path))
            record_id = str(question.record.id)
            if record_id in lines:
                raise _unusable(f"id {record_id!r} is already that of line {lines[record_id]}")
        except RecmasError as error:
            (problem,) = error.problems
            problems.append(replace(problem, file=str(path), line=row.line))
            continue
        lines[record_id] = row.line
        questions.append(question)
    if problems:
        raise RecmasError(problems[:MAX_PROBLEMS])
    if not questions:
        why = "".join(f"; {number} left out: {reason}" for reason, number in left_out.items())
        hint = "Give a file that has some."
        raise fail("RM601", f"no records{why}", file=str(path), hint=hint)
    return DataSet(
        questions=tuple(questions),
        num_records=len(rows),
        digest=_digest(path),
        left_out=dict(left_out),
    )


def left_out_warnings(left_out: Mapping[str, int], *, file: str) -> tuple[Problem, ...]:
    """Return a warning that tells how many records of a file were left out, and why."""
    if not left_out:
        return ()
    reasons = "; ".join(f"{number} {reason}" for reason, number in left_out.items())
    message = f"{counted(sum(left_out.values()), 'record')} left out: {reasons}"
    hint = "The others are all that is counted."
    return (Problem(code="RM652", severity="warning", message=message, hint=hint, file=file),)


def rows_of(path: Path, data: DataSection, beside: Path | None) -> Iterator[Row]:
    """Yield the rows of a file, of the form that a reader knows or of a table."""
    if data.reader is None and beside is not None:
        hint = "Leave it out: this protocol reads its questions from one file."
        raise fail("RM506", f"{beside} is given beside the data", hint=hint)
    published = None if data.reader is None else _published(path, data.reader, beside)
    yield from _table(path, data) if published is None else published


def _published(path: Path, reader: str, beside: Path | None) -> Iterator[Row] | None:
    """Return the rows of a published file; None if it is of another form."""
    with _opened(path) as stream:
        raw = stream.read()
    rows = None
    if beside is not None:
        with _opened(beside) as stream:
            rows = [row.fields for row in read_rows(stream, file=str(beside)) if row.fields]
    with suppress(OSError, EOFError, zlib.error):  # what is damaged is told where tables are read
        try:
            return READERS[reader](Published.of(raw, file=str(path), beside=rows))
        except NeedsQuestionsError:
            hint = "Join them: recmasc data PROTOCOL FILE --beside QUESTIONS -o OUT.jsonl."
            message = "the file has no questions, which stand in another one"
            raise fail("RM601", message, file=str(path), hint=hint) from None
    return None


def _table(path: Path, data: DataSection) -> Iterator[Row]:
    """Yield the rows of a table; one without a line of column names has those of the protocol."""
    with _opened(path) as stream:
        rows = read_rows(stream, file=str(path))
        first = next(rows, None)
    if first is None:
        return
    known = {part for names in (*data.fields.values(), *data.gold.values()) for part in names}
    has_names = data.columns is None or first.fields is None or known & first.fields.keys()
    with _opened(path) as stream:
        yield from read_rows(stream, file=str(path), columns=None if has_names else data.columns)


def _opened(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one; a pipe or a device might never end."""
    hint = f"Give --data a file of {FORMATS}."
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise fail("RM502", "this is not a regular file", file=str(path), hint=hint)
        return path.open("rb")
    except OSError as error:
        message = f"the data cannot be read: {error.strerror}"
        raise fail("RM502", message, file=str(path), hint=hint) from error


def _digest(path: Path) -> str:
    with _opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _selected(kept: Sequence[int], protocol: Protocol) -> list[int]:
    count = len(kept) if protocol.n is None else min(protocol.n, len(kept))
    if protocol.selection.kind == "first":
        return list(kept[:count])
    chosen = random.Random(protocol.selection.seed).sample(kept, count)  # noqa: S311
    return sorted(chosen)


def _reason_to_leave_out(row: Row, data: DataSection) -> str | None:
    """Return why a record is no question of the protocol; what is malformed is told later."""
    judge = LEAVES_OUT.get(data.convert or "")
    if judge is None or row.fields is None:
        return None
    with suppress(*UNREADABLE):
        return judge(_given(_found(row.fields, data)))
    return None


def _found(row: Mapping[str, Any], data: DataSection) -> dict[str, Any]:
    """Return the value of every name of the protocol; None where the record has none."""
    return {name: value_at(row, paths) for name, paths in {**data.fields, **data.gold}.items()}


def _given(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


def _question(
    found_row: Row, *, index: int, data: DataSection, shown: tuple[str, ...], file: str
) -> Question:
    """Return a row as a question; its index is its place in the file, whatever is selected."""
    row = found_row.fields
    if row is None:
        raise _unusable(found_row.problem)
    found = _found(row, data)
    values = _given(found)
    try:
        if data.convert is not None:
            values = CONVERTERS[data.convert](values)
    except UNREADABLE as error:
        missing = sorted(set(found) - set(_given(found)))
        lacks = f"; it has no {', '.join(missing)}" if missing else ""
        raise _unusable(
            f"the record is not of the form that {data.convert!r} reads{lacks}{_reason(error)}"
        ) from error
    if not str(values.get("question") or "").strip():
        listed = ", ".join(sorted(row)) or "nothing"
        raise _unusable(f"no question under {' or '.join(data.fields['question'])}, but {listed}")
    record_id = value_at(row, data.id)
    fields = {name: value for name, value in values.items() if name in data.fields}
    fields["question"] = _with_appended(fields, data.append, shown)
    return Question(
        record=Record(
            id=str(found_row.number if record_id is None else record_id),
            fields=fields,
            index=index,
        ),
        file=file,
        line=found_row.line,
        gold={name: value for name, value in values.items() if name not in data.fields},
    )


def _reason(error: Exception) -> str:
    """Return why a converter failed, where its error says so in words of its own."""
    return f": {error}" if type(error) is ValueError and str(error) else ""


def _with_appended(
    fields: Mapping[str, Any], append: Mapping[str, str], shown: tuple[str, ...]
) -> str:
    """Return the question with the fields that the prompts would not show otherwise."""
    parts = [str(fields["question"])]
    there = {field_place(one).name for one in shown}
    for name, heading in append.items():
        if name not in there and fields.get(name):
            parts.append(f"{heading}\n{field_text(name, fields)}".strip())
    return "\n\n".join(parts)


def value_at(row: Mapping[str, Any], paths: list[str]) -> Any:
    """Return the value at the first path that leads to one; None if none does."""
    for path in paths:
        if "|" in path and path not in row:
            listed = [value_at(row, [part]) for part in path.split("|")]
            if all(value is not None for value in listed):
                return listed
            continue
        value: Any = row
        # A name may itself hold a point or a space: the whole is tried before its parts.
        for part in (path,) if path in row else path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _unusable(message: str) -> RecmasError:
    return fail("RM601", message, hint="Correct the data, or choose the protocol that it is for.")
