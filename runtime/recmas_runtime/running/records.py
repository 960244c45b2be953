"""Records in, answers out: the types, and the JSON lines that hold them."""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.tables import FORMATS, MAX_ROW_BYTES, read_rows
from recmas_runtime.core.text import listed
from recmas_runtime.formats.plan import field_place, filled_fields
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.prompts.render import field_text
from recmas_runtime.scheduling.remote_calls import RemoteUsage
from recmas_runtime.tools.calls import ToolResult

FinishReason = Literal["stop", "length"]
# Ids are text or integers, and stay what they are; two that read alike count as one.
RecordId = str | int
# Ids stand in messages, answers and traces.
MAX_ID_CHARS: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to answer; prompts may refer to its fields, `id` and what else the input gave.

    Its index is the place in the input, from 0. Sampling adds it to the seed, so that an answer
    does not depend on which records share its batch.

    Attributes:
        turns: What was said before, shown as turns of their own before the answer agent's prompt.
        given: The fields as they were given, before a counted id was added.
    """

    id: RecordId
    fields: Mapping[str, object]
    index: int = 0
    turns: tuple[EarlierTurn, ...] = ()
    given: Mapping[str, object] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", self.fields)
        # Prompts may show the id, whether it was given or counted.
        object.__setattr__(self, "fields", {**self.fields, "id": self.id})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: Text tokens that were prefilled, over all agents and rounds, and those of
            tool results.
        handover_tokens: Of text that agents wrote for each other; latent systems write none.
        completion_tokens: Of the answer, including one that ended it.
        remote: By remote model, what its calls took. No other count has any of that but
            `completion_tokens`, where such a model writes the answer.
    """

    prompt_tokens: int
    latent_steps: int
    handover_tokens: int
    completion_tokens: int
    remote: Mapping[str, RemoteUsage] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the form that answers have; `remote` is there where such models were asked."""
        told = asdict(self)
        if not self.remote:
            del told["remote"]
        return told


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall time by phase, in milliseconds: of the whole batch, the same in each of its answers.

    Of a record that shared engine calls with others it is its share of their time. Hand-over text
    is `write`, the answer's `decode`; neither counts the time inside tools. What remote models
    write, of whichever kind, is `ask`.
    """

    prefill: float
    think: float
    send: float
    write: float
    decode: float
    tools: float
    total: float
    ask: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return the form that answers have; `ask` is there where remote models were asked."""
        told = {phase: round(ms, 3) for phase, ms in asdict(self).items()}
        if not self.ask:
            del told["ask"]
        return told


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, its text including tool calls and their results.

    It finished with `stop` for a stop token or string, with `length` at `max_new_tokens` or where
    the backbone's positions end. The answering round counts among the rounds.

    Attributes:
        id: The record's, as it was given; its number in the input, as text, if it has none.
        record: The record's fields as they were given.
        batch_size: Records that ran as one batch, whose times these are.
    """

    id: RecordId
    record: Mapping[str, object]
    answer: str
    finish_reason: FinishReason
    rounds: int
    usage: Usage
    timing_ms: Timing
    batch_size: int = 1
    tool_calls: tuple[ToolResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` and answer files have."""
        return {
            "id": self.id,
            "record": dict(self.record),
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "rounds": self.rounds,
            "usage": self.usage.to_json(),
            "timing_ms": self.timing_ms.to_json(),
            "batch_size": self.batch_size,
            "tool_calls": [result.to_json() for result in self.tool_calls],
        }


@dataclass(frozen=True, kw_only=True)
class FailedRecord:
    """A record without an answer, and why.

    Attributes:
        id: The record's, or the number of its line.
        record: The fields as they were given; None for a line that holds no record.
    """

    id: RecordId
    record: Mapping[str, object] | None
    problem: Problem

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` and answer files have."""
        return {
            "id": self.id,
            "record": None if self.record is None else dict(self.record),
            "error": {"code": self.problem.code, "message": self.problem.message},
        }


# Longer than any prompt that a bundle takes.
MAX_LINE_BYTES: Final = MAX_ROW_BYTES
# Deeper than data is, and what can be read can also be written.
MAX_NESTING: Final = 100
_BLOCK_BYTES: Final = 2**20
# How files begin, or are named, whose lines are not their records.
_OTHER_STARTS: Final = (b"\x1f\x8b", b"PAR1", b"[")
_OTHER_NAMES: Final = (".csv", ".tsv", ".json", ".parquet", ".gz")

Question = str | Mapping[str, object] | Record


def is_one(questions: object) -> bool:
    """Return whether this is one question, or nothing at all, and not several.

    A text could be asked letter by letter, and a mapping field by field.
    """
    one = isinstance(questions, str | bytes | Mapping | Record)
    return one or not isinstance(questions, Iterable)


def as_record(question: Question, index: int) -> Record:
    """Return a question as a record; its index counts from 0, its id from 1 where none is given.

    Raises:
        RecmasError: RM500 for what is none of these.
    """
    if isinstance(question, Record):
        return question
    fields = {"question": question} if isinstance(question, str) else question
    if not isinstance(fields, Mapping):
        kind = type(fields).__name__
        hint = "Give a text, a mapping of fields, or a Record."
        raise fail("RM500", f"record {index + 1} is of the type {kind}", hint=hint)
    given: Any = fields.get("id", str(index + 1))
    return Record(id=given, fields=fields, index=index)


def question_record(
    question: str | Mapping[str, object], fields: Sequence[str], *, index: int = 0
) -> Record:
    """Return the record of a single question or its fields; its index is from 0, its id from 1.

    Raises:
        RecmasError: RM500 if it is blank, not valid text, or the prompts need more than it.
    """
    record = as_record(question, index)
    check_record(record, fields)
    return record


def check_question(record: Record, fields: Sequence[str]) -> None:
    """Raise RM500 for a question that no prompt shows: it would be answered unread."""
    names = {field_place(shown).name for shown in fields}
    if "question" in record.given and "question" not in names:
        uses = f"use {listed(fields)}" if fields else "show nothing of a record"
        raise fail(
            "RM500",
            f"record {record.id!r} has a question, and no prompt shows it: the prompts {uses}",
            hint=needed_fields(fields) if fields else "Write {{ question }} in a prompt.",
        )


def check_record(record: Record, fields: Sequence[str]) -> None:
    """Raise RM500 for an unusable id, and for fields of prompts that are missing or unusable."""
    check_id(record.id, "Correct the record.")
    names = dict.fromkeys(field_place(shown).name for shown in fields)
    missing = [name for name in names if record.fields.get(name) is None]
    if missing:
        name = missing[0]
        how = f"has null in field {name!r}" if name in record.fields else f"has no field {name!r}"
        raise fail(
            "RM500",
            f"record {record.id!r} {how}, which the prompts use",
            hint=needed_fields(fields),
        )
    for shown in fields:
        text = field_text(shown, record.fields)
        if not text.strip() and field_place(shown).name == "question":
            raise fail(
                "RM500", f"record {record.id!r} has an empty question", hint="Write a question."
            )


def needed_fields(fields: Sequence[str]) -> str:
    """Return how to give what the prompts use, as a hint."""
    line = json.dumps(filled_fields(fields, "..."))
    options = " ".join(field_option(shown) for shown in fields)
    return (
        f"The prompts use {listed(fields)}: give {options}, or --input with lines such as {line}."
    )


def field_option(shown: str, *, value: str = "...") -> str:
    """Return how a command line gives a field, or an entry of a list; shells read brackets."""
    return f"--field '{shown}'={value}" if "[" in shown else f"--field {shown}={value}"


def check_id(given: object, hint: str) -> None:
    """Raise RM500 for an id that is none, with this hint."""
    if type(given) not in (str, int) or given == "":
        shown = json.dumps(given, default=repr)
        raise fail("RM500", f"id {shown} is neither text nor an integer", hint=hint)
    if _num_chars(given) > MAX_ID_CHARS:
        raise fail("RM500", f"the id is longer than {MAX_ID_CHARS} characters", hint=hint)


def _num_chars(given: object) -> int:
    if isinstance(given, int):  # Python refuses to write out very long ones
        return 1 + given.bit_length() * 30103 // 100000
    return len(str(given))


def open_records(file: str) -> BinaryIO:
    """Open an input of records: a file, or a pipe, which may be endless.

    Raises:
        RecmasError: RM502 if it cannot be read, or is a device that never ends.
    """
    try:
        stream = Path(file).open("rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:  # NUL in a name
        raise unreadable(file, OSError(errno.EINVAL, str(error))) from error
    try:
        refuse_devices(stream, file)
    except BaseException:
        stream.close()
        raise
    return stream


def refuse_devices(stream: BinaryIO, file: str) -> None:
    """Raise RM502 for an input that never ends, such as /dev/zero."""
    found = os.fstat(stream.fileno())
    is_null = os.path.samestat(found, Path(os.devnull).stat())
    is_device = stat.S_ISCHR(found.st_mode) and not stream.isatty() and not is_null
    if is_device or stat.S_ISBLK(found.st_mode):
        raise unreadable(file, OSError(errno.EINVAL, "it is a device"))


def count_records(stream: BinaryIO, file: str) -> int | None:
    """Return how many records lie ahead in a regular file of JSON lines; None for other inputs."""
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return None
    start = stream.tell()
    head = stream.read(_BLOCK_BYTES)
    is_other = head.lstrip().startswith(_OTHER_STARTS) or file.lower().endswith(_OTHER_NAMES)
    count, in_line, block = 0, False, b"" if is_other else head
    while block:
        *whole, rest = block.split(b"\n")
        for part in whole:
            count += in_line or bool(part.strip())
            in_line = False
        in_line = in_line or bool(rest.strip())
        block = stream.read(_BLOCK_BYTES)
    stream.seek(start)
    return None if is_other else count + in_line


def read_records(
    stream: BinaryIO, *, file: str, fields: Sequence[str]
) -> Iterator[Record | FailedRecord]:
    """Read records from a table of any form that `core.tables` knows, JSON lines for one.

    A row that cannot be used yields a failure and reading goes on. A record without `id` gets the
    number of its line, in other tables its place among the records; its index counts these too, so
    that neither changes when another row is fixed. Problems name file and line.

    Raises:
        RecmasError: RM502 if reading itself fails, RM201 for Parquet without pyarrow.
    """
    seen: dict[str, int] = {}
    for row in read_rows(stream, file=file, max_row_bytes=MAX_LINE_BYTES):
        found: Record | None = None
        try:
            if row.fields is None:
                raise _unusable(row.problem)
            found = as_record(_storable(row.fields), row.number - 1)
            check_id(found.id, _CORRECT_LINE)
            if str(found.id) in seen:
                raise _unusable(f"id {found.id!r} is already that of line {seen[str(found.id)]}")
            check_record(found, fields)
            seen[str(found.id)] = row.line
        except RecmasError as error:
            (problem,) = error.problems
            # An id that is no id cannot stand for the record.
            has_id = found is not None and type(found.id) in (str, int)
            yield FailedRecord(
                id=found.id if found is not None and has_id else str(row.number),
                record=None if found is None else found.given,
                problem=replace(problem, file=file, line=row.line),
            )
        else:
            yield found


def usable(found: Iterable[Record | FailedRecord], problems: list[Problem]) -> Iterator[Record]:
    """Yield the records; the problems of the others are kept instead."""
    for item in found:
        if isinstance(item, FailedRecord):
            problems.append(item.problem)
        else:
            yield item


def unreadable(file: str, error: OSError) -> RecmasError:
    """Return what to raise for an input that cannot be opened or read."""
    return fail(
        "RM502",
        f"the input cannot be read: {reason_of(error)}",
        file=file,
        hint=f"Give {FORMATS}; or - for standard input.",
    )


def _storable(value: Any, depth: int = 0) -> Any:
    """Return what a table holds as JSON has it: dates as text, missing numbers as null.

    Raises:
        RecmasError: RM500 for what JSON cannot hold.
    """
    if depth >= MAX_NESTING and isinstance(value, dict | list | tuple):
        raise _unusable(f"nested more than {MAX_NESTING} levels deep")
    match value:
        case None | str() | bool() | int():
            return value
        case float():
            if math.isinf(value):
                raise _unusable("a number is beyond the range of numbers")
            return None if math.isnan(value) else value
        case dict():
            return {str(name): _storable(item, depth + 1) for name, item in value.items()}
        case list() | tuple():
            return [_storable(item, depth + 1) for item in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Decimal() | datetime.timedelta() | uuid.UUID():
            return str(value)
    raise _unusable(f"it holds {type(value).__name__}, which is neither text nor a number")


_CORRECT_LINE: Final = "Correct the line; the other records are not affected."


def _unusable(message: str) -> RecmasError:
    return fail("RM500", message, hint=_CORRECT_LINE)
