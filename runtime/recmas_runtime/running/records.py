"""Records in, answers out: the types, and the JSON lines that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.jsonl import JsonLines
from recmas_runtime.formats.codec import refuse_constant
from recmas_runtime.prompts.render import field_text
from recmas_runtime.tools.calls import ToolResult

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One thing to answer; prompts may refer to its fields, `id` and what else the input gave.

    Its index is the place in the input, from 0. Sampling adds it to the seed, so that an answer
    does not depend on which records share its batch.
    """

    id: str
    fields: Mapping[str, object]
    index: int = 0

    def __post_init__(self) -> None:
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
    """

    prompt_tokens: int
    latent_steps: int
    handover_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall time by phase, in milliseconds; for a batch, of the whole batch.

    Hand-over text is `write`, the answer's `decode`; neither counts the time inside tools.
    """

    prefill: float
    think: float
    send: float
    write: float
    decode: float
    tools: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, its text including tool calls and their results.

    It finished with `stop` for a stop token or string, with `length` at `max_new_tokens` or where
    the backbone's positions end. The answering round counts among the rounds.
    """

    id: str
    question: str
    answer: str
    finish_reason: FinishReason
    rounds: int
    usage: Usage
    timing_ms: Timing
    tool_calls: tuple[ToolResult, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` and answer files have."""
        timing = {phase: round(ms, 3) for phase, ms in asdict(self.timing_ms).items()}
        calls = [result.to_json() for result in self.tool_calls]
        return {**asdict(self), "timing_ms": timing, "tool_calls": calls}


# Longer than any prompt that a bundle takes.
MAX_LINE_BYTES: Final = 2**24
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

Question = str | Mapping[str, object] | Record


def as_record(question: Question, index: int) -> Record:
    """Return a question as a record; its index counts from 0, its id from 1 where none is given."""
    if isinstance(question, Record):
        return question
    fields = {"question": question} if isinstance(question, str) else question
    return Record(id=str(fields.get("id", index + 1)), fields=fields, index=index)


def question_record(question: str, fields: Sequence[str], *, index: int = 0) -> Record:
    """Return the record of a single question, its index from 0, its id from 1.

    Raises:
        RecmasError: RM500 if it is blank, not valid text, or the prompts need more than it.
    """
    record = as_record(question, index)
    check_record(record, fields)
    return record


def check_record(record: Record, fields: Sequence[str]) -> None:
    """Raise RM500 if a field that prompts use is missing, of a wrong kind, or a blank question."""
    for name in fields:
        if not field_text(name, record.fields).strip() and name == "question":
            raise fail(
                "RM500", f"record {record.id!r} has an empty question", hint="Write a question."
            )


def read_records(
    stream: BinaryIO, *, file: str, fields: Sequence[str]
) -> Iterator[Record | Problem]:
    """Read records from JSON lines; a bad line yields a problem and reading goes on.

    A record without `id` gets its line number, and its index counts lines too, so that neither
    changes when another line is fixed. Blank lines are skipped, a byte order mark is tolerated.
    Problems name the file.

    Raises:
        RecmasError: RM502 if reading itself fails.
    """
    seen: dict[str, int] = {}
    for number, line in _numbered_lines(stream, file=file):
        try:
            if line is None:
                raise _unusable(f"the line is longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            record = _parse_record(line, number=number)
            if record.id in seen:
                raise _unusable(f"id {record.id!r} is already that of line {seen[record.id]}")
            check_record(record, fields)
            seen[record.id] = number
        except RecmasError as error:
            (problem,) = error.problems
            yield Problem(
                code=problem.code,
                message=problem.message,
                hint=problem.hint,
                file=file,
                line=number,
            )
        else:
            yield record


def usable(found: Iterable[Record | Problem], problems: list[Problem]) -> Iterator[Record]:
    """Yield the records; problems are kept instead."""
    for item in found:
        if isinstance(item, Problem):
            problems.append(item)
        else:
            yield item


def _numbered_lines(stream: BinaryIO, *, file: str) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines with their numbers, from 1; None for one that is too long to be a record."""
    number = 0
    while line := _read_line(stream, file=file):
        number += 1
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if len(line) <= MAX_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = _read_line(stream, file=file)
        yield number, None


def _read_line(stream: BinaryIO, *, file: str) -> bytes:
    try:
        return stream.readline(MAX_LINE_BYTES + 1)
    except OSError as error:
        raise unreadable(file, error) from error


def unreadable(file: str, error: OSError) -> RecmasError:
    """Return what to raise for an input that cannot be opened or read."""
    return fail(
        "RM502",
        f"the input cannot be read: {error.strerror}",
        file=file,
        hint="Give --input a file of JSON lines, or - for standard input.",
    )


def _parse_record(line: bytes, *, number: int) -> Record:
    try:
        parsed = json.loads(line.rstrip(b"\r\n").decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise _unusable(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise _unusable(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise _unusable(f"not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise _unusable("the line is not a JSON object")
    record_id = parsed.get("id", number)
    if type(record_id) not in (str, int) or record_id == "":
        raise _unusable(f"id {record_id!r} is neither text nor an integer")
    return as_record(parsed, number - 1)


def _unusable(message: str) -> RecmasError:
    return fail("RM500", message, hint="Correct the line; the other records are not affected.")


class AnswerWriter:
    """Writes answers as JSON lines, each whole or not at all; to standard output without a path.

    A file ends with a complete line even after an error. Resuming keeps the answers in the file;
    `finished` are the ids of their records.

    Raises:
        RecmasError: RM503 if it cannot be opened, RM502 if a file to resume is no answer file.
    """

    def __init__(self, path: Path | None, *, resume: bool = False) -> None:
        self._name = "<stdout>" if path is None else str(path)
        try:
            self._file = JsonLines(path)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            found = enumerate(self._file.lines(), start=1) if resume else ()
            self.finished = frozenset(self._answered_id(line, number=n) for n, line in found)
            self._file.keep(None if resume else 0)
        except BaseException:
            self._file.close()
            raise

    def write(self, answer: Answer) -> None:
        """Append an answer.

        Raises:
            RecmasError: RM503 if it could not be written; the answers before it are kept.
            BrokenPipeError: If nobody reads standard output any more.
        """
        try:
            self._file.append(answer.to_json())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Make sure that the answers are on the disk; RM503 if they cannot be."""
        try:
            self._file.sync()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._file.close()

    def _answered_id(self, line: bytes, *, number: int) -> str:
        try:
            answer: Any = json.loads(line)
            if isinstance(answer["id"], str) and isinstance(answer["answer"], str):
                return answer["id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise fail(
            "RM502",
            "--resume found a line that is not an answer",
            file=self._name,
            line=number,
            hint="Name the output of an earlier run, or leave --resume out to start afresh.",
        )

    def _unwritable(self, error: OSError) -> RecmasError:
        return fail(
            "RM503",
            f"the output cannot be written: {error.strerror}",
            file=self._name,
            hint="Make room or choose another place; --resume goes on from the finished answers.",
        )
