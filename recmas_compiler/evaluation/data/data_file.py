"""Data files: records of our own form or of the form that a data set is published in."""

from __future__ import annotations

import hashlib
import random
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from recmas_compiler.evaluation.data.converters import CONVERTERS, UNREADABLE
from recmas_compiler.evaluation.data.protocol import DataSection, Protocol
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.tables import FORMATS, Row, read_rows
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
    """The questions of an evaluation in the order of the file, and the file's sha256."""

    questions: tuple[Question, ...]
    num_records: int
    digest: str


def load_data(path: Path, protocol: Protocol, *, shown: tuple[str, ...]) -> DataSet:
    """Read a data file as a protocol says.

    Args:
        path: JSON lines, a JSON list, CSV or Parquet (needs pyarrow), also gzipped.
        shown: Fields that the bundle's prompts show in a place of their own.

    Raises:
        RecmasError: RM502 if the file cannot be read, RM201 if Parquet needs a package, RM601 with
            the line of every selected record that does not fit the protocol.
    """
    rows = list(_rows(path, protocol.data))
    questions: list[Question] = []
    problems: list[Problem] = []
    lines: dict[str | int, int] = {}
    for index in _selected(len(rows), protocol):
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
        raise fail("RM601", "no records", file=str(path), hint="Give --data a file that has some.")
    return DataSet(
        questions=tuple(questions),
        num_records=len(rows),
        digest=_digest(path),
    )


def _rows(path: Path, data: DataSection) -> Iterator[Row]:
    """Yield the rows of a file; one without a line of column names has those of the protocol."""
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


def _selected(num_rows: int, protocol: Protocol) -> list[int]:
    count = num_rows if protocol.n is None else min(protocol.n, num_rows)
    if protocol.selection.kind == "first":
        return list(range(count))
    chosen = random.Random(protocol.selection.seed).sample(range(num_rows), count)  # noqa: S311
    return sorted(chosen)


def _question(
    found_row: Row, *, index: int, data: DataSection, shown: tuple[str, ...], file: str
) -> Question:
    """Return a row as a question; its index is its place in the file, whatever is selected."""
    row = found_row.fields
    if row is None:
        raise _unusable(found_row.problem)
    names = {**data.fields, **data.gold}
    found = {name: _value(row, paths) for name, paths in names.items()}
    values = {name: value for name, value in found.items() if value is not None}
    try:
        if data.convert is not None:
            values = CONVERTERS[data.convert](values)
    except UNREADABLE as error:
        missing = sorted(set(names) - set(_names_of(found)))
        lacks = f"; it has no {', '.join(missing)}" if missing else ""
        raise _unusable(
            f"the record is not of the form that {data.convert!r} reads{lacks}{_reason(error)}"
        ) from error
    if not str(values.get("question") or "").strip():
        listed = ", ".join(sorted(row)) or "nothing"
        raise _unusable(f"no question under {' or '.join(data.fields['question'])}, but {listed}")
    record_id = _value(row, data.id)
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


def _names_of(found: Mapping[str, Any]) -> list[str]:
    """Return the names that a record gives a value to."""
    return [name for name, value in found.items() if value is not None]


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


def _value(row: Mapping[str, Any], paths: list[str]) -> Any:
    """Return the value at the first path that leads to one; None if none does."""
    for path in paths:
        if "|" in path and path not in row:
            listed = [_value(row, [part]) for part in path.split("|")]
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
