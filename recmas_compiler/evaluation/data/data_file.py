"""Data files: records of our own form or of the form that a data set is published in."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from recmas_compiler.evaluation.data.protocol import CONVERTERS, UNREADABLE, DataSection, Protocol
from recmas_runtime.core.errors import Problem, RecmasError, fail
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
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """The questions of an evaluation in the order of the file, and the file's sha256."""

    questions: tuple[Question, ...]
    num_records: int
    digest: str


def load_data(path: Path, protocol: Protocol, *, shown: tuple[str, ...]) -> DataSet:
    """Read a data file as a protocol says.

    Args:
        path: JSON lines, a JSON list, or Parquet (needs pyarrow).
        shown: Fields that the bundle's prompts show in a place of their own.

    Raises:
        RecmasError: RM502 if the file cannot be read, RM201 if Parquet needs a package, RM601 with
            the line of every selected record that does not fit the protocol.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise fail(
            "RM502",
            f"the data cannot be read: {error.strerror}",
            file=str(path),
            hint="Give --data a file of JSON lines.",
        ) from error
    rows = list(_rows(path, raw))
    questions: list[Question] = []
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for index in _selected(len(rows), protocol):
        line, row = rows[index]
        try:
            question = _question(row, index=index, line=line, data=protocol.data, shown=shown)
            record_id = question.record.id
            if record_id in lines:
                raise _unusable(f"id {record_id!r} is already that of line {lines[record_id]}")
        except RecmasError as error:
            (problem,) = error.problems
            problems.append(replace(problem, file=str(path), line=line))
            continue
        lines[record_id] = line
        questions.append(question)
    if problems:
        raise RecmasError(problems[:MAX_PROBLEMS])
    if not questions:
        raise fail("RM601", "no records", file=str(path), hint="Give --data a file that has some.")
    return DataSet(
        questions=tuple(questions),
        num_records=len(rows),
        digest=hashlib.sha256(raw).hexdigest(),
    )


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the records with their lines, or places in a list, from 1."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), start=1)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "Give --data a UTF-8 text file, or a .parquet file."
        raise fail("RM601", "not UTF-8", file=str(path), line=line, hint=hint) from error
    if text.lstrip().startswith("["):
        listed = _parsed(text, path=path, line=None)
        numbered = list(enumerate(listed, start=1))
    else:
        # Not str.splitlines: JSON may hold other line separators.
        lines = enumerate(text.split("\n"), start=1)
        numbered = [(n, _parsed(line, path=path, line=n)) for n, line in lines if line.strip()]
    for line, row in numbered:
        if not isinstance(row, Mapping):
            raise fail(
                "RM601",
                "the record is not a JSON object",
                file=str(path),
                line=line,
                hint="Give --data one JSON object per line.",
            )
        yield line, row


def _parsed(text: str, *, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise fail(
            "RM601",
            f"not valid JSON: {error}",
            file=str(path),
            line=line,
            hint="Give --data one JSON object per line, or a JSON list.",
        ) from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise fail(
            "RM201",
            f"reading {path.name} needs pyarrow, which is not installed",
            hint="Install it with `pip install pyarrow`, or convert the file to JSON lines.",
        ) from error
    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except ArrowInvalid as error:
        hint = "Download the file again."
        raise fail("RM601", f"not Parquet: {error}", file=str(path), hint=hint) from error
    return rows


def _selected(num_rows: int, protocol: Protocol) -> list[int]:
    count = num_rows if protocol.n is None else min(protocol.n, num_rows)
    if protocol.selection.kind == "first":
        return list(range(count))
    chosen = random.Random(protocol.selection.seed).sample(range(num_rows), count)  # noqa: S311
    return sorted(chosen)


def _question(
    row: Mapping[str, Any], *, index: int, line: int, data: DataSection, shown: tuple[str, ...]
) -> Question:
    """Return a row as a question; its index is its place in the file, whatever is selected."""
    names = {**data.fields, **data.gold}
    found = {name: _value(row, paths) for name, paths in names.items()}
    values = {name: value for name, value in found.items() if value is not None}
    try:
        if data.convert is not None:
            values = CONVERTERS[data.convert](values)
    except UNREADABLE as error:
        missing = sorted(set(names) - set(values))
        lacks = f"; it has no {', '.join(missing)}" if missing else ""
        raise _unusable(
            f"the record is not of the form that {data.convert!r} reads{lacks} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not str(values.get("question") or "").strip():
        listed = ", ".join(sorted(row)) or "nothing"
        raise _unusable(f"no question under {' or '.join(data.fields['question'])}, but {listed}")
    record_id = _value(row, data.id)
    fields = {name: value for name, value in values.items() if name in data.fields}
    fields["question"] = _with_appended(fields, data.append, shown)
    return Question(
        record=Record(id=str(line if record_id is None else record_id), fields=fields, index=index),
        gold={name: value for name, value in values.items() if name not in data.fields},
    )


def _with_appended(
    fields: Mapping[str, Any], append: Mapping[str, str], shown: tuple[str, ...]
) -> str:
    """Return the question with the fields that the prompts would not show otherwise."""
    parts = [str(fields["question"])]
    for name, heading in append.items():
        if name not in shown and fields.get(name):
            parts.append(f"{heading}\n{field_text(name, fields)}".strip())
    return "\n\n".join(parts)


def _value(row: Mapping[str, Any], paths: list[str]) -> Any:
    """Return the value at the first path that leads to one; None if none does."""
    for path in paths:
        value: Any = row
        # A name may itself hold a point or a space: the whole is tried before its parts.
        for part in (path,) if path in row else path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def _unusable(message: str) -> RecmasError:
    return fail("RM601", message, hint="Correct the data, or choose the protocol that it is for.")
