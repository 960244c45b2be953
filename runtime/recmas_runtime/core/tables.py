"""Tables of records: JSON lines, JSON, CSV and Parquet, each also gzipped, read row by row.

A row that cannot be used is told as such and costs no other row. Memory is bounded by the longest
row, save for JSON that is not a list of records and for Parquet that comes through a pipe.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, Final

from recmas_runtime.core.errors import RecmasError, fail

MAX_ROW_BYTES: Final = 2**24
"""A longer row is a mistake and no record."""

FORMATS: Final = "JSON lines, a JSON list, CSV, TSV or Parquet, also gzipped"
"""For messages and help texts."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_UTF16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP: Final = b"\x1f\x8b"
_PARQUET: Final = b"PAR1"
_PIECE: Final = 2**16
# As much of a start as tells the format: four bytes of what may be a mark, or the first character
# of a text, and the one behind a bracket.
_TELLING: Final = re.compile(
    rb"[\x1fP\xff\xfe].{3}|(?:\xef\xbb\xbf)?\s*(?:\[\s*[^\s]|[^\s\[\x1fP\xef\xff\xfe])", re.DOTALL
)
_RECORD_LIST: Final = re.compile(rb"\s*\[\s*[{\]]")
_ESCAPED: Final = "surrogateescape"  # bytes that are no UTF-8 become lone surrogates
# What was cut off may end in the middle of a name or of a number.
_LONGEST_WORD: Final = len("-Infinity")
_TOO_DEEP: Final = "nested too deep to be read"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: its fields, or the problem that it has instead.

    Attributes:
        number: What to call the record where it has no id: its line in JSON lines, else its place
            among the records; from 1.
        line: The line of the file on which it begins, from 1; of Parquet its place.
    """

    number: int
    line: int
    fields: Mapping[str, Any] | None = None
    problem: str = ""


def read_rows(
    stream: BinaryIO,
    *,
    file: str,
    columns: Sequence[str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Iterator[Row]:
    """Yield the rows of a table in order.

    What the stream holds decides its format; its name only where that leaves it open: `.csv`,
    `.tsv`, and `.json` for one JSON value (a list of records, one record, or a list for each
    column) in place of JSON lines.

    Args:
        stream: Binary, as `open(path, "rb")` or standard input gives it.
        file: Its name, for the format and for messages.
        columns: Names of the columns of a CSV file that has no line with them.

    Raises:
        RecmasError: RM502 if it cannot be read any further, RM201 if Parquet needs a package.
    """
    try:
        yield from _rows(stream, file=file, columns=columns, max_row_bytes=max_row_bytes)
    except (OSError, EOFError, zlib.error) as error:  # gzip raises each of them
        reason = getattr(error, "strerror", None) or str(error)
        raise _unreadable(f"the input cannot be read: {reason}", file=file) from error


def _rows(
    stream: BinaryIO, *, file: str, columns: Sequence[str] | None, max_row_bytes: int
) -> Iterator[Row]:
    name = PurePath(file.lower())
    text, start = _started(stream)
    if is_packed := start.startswith(_GZIP):
        text, start = _started(gzip.GzipFile(fileobj=text))
        name = name.with_suffix("") if name.suffix == ".gz" else name
    if start.startswith(_PARQUET) or name.suffix == ".parquet":
        can_seek = not is_packed and stream.seekable()
        if can_seek:
            stream.seek(0)
        # Its index stands at its end.
        yield from _parquet_rows(stream if can_seek else io.BytesIO(text.read()), file=file)
        return
    if start.startswith(_UTF16):
        raise _unreadable("the input is UTF-16", file=file, hint="Save it as UTF-8.")
    if start.startswith(_BYTE_ORDER_MARK):
        start = start.removeprefix(text.read(len(_BYTE_ORDER_MARK)))
    if name.suffix in (".csv", ".tsv"):
        yield from _csv_rows(text, name.suffix, columns, max_row_bytes)
    elif _RECORD_LIST.match(start):
        yield from _JsonList(text, max_row_bytes).rows()
    elif name.suffix == ".json":
        yield from _json_rows(text, max_row_bytes)
    else:
        yield from _line_rows(text, max_row_bytes)


def _started(stream: BinaryIO | gzip.GzipFile) -> tuple[io.BufferedReader, bytes]:
    """Return the stream, and as much of its start as tells the format; all of it is still there."""
    start = b""
    read: Any = getattr(stream, "read1", stream.read)
    # No more than that: a person may be typing.
    while not _TELLING.match(start) and (piece := read(_PIECE)) and len(start) < MAX_ROW_BYTES:
        start += piece
    return io.BufferedReader(_Replayed(start, read), _PIECE), start


class _Replayed(io.RawIOBase):
    """A stream whose start was read already."""

    def __init__(self, start: bytes, read: Any) -> None:
        self._start = start
        self._rest = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._start[: len(buffer)] or self._rest(len(buffer))
        self._start = self._start[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _line_rows(stream: io.BufferedReader, max_row_bytes: int) -> Iterator[Row]:
    for line, raw in _lines(stream, max_row_bytes):
        if raw is None:
            problem = f"the line is longer than {max_row_bytes} bytes"
            yield Row(number=line, line=line, problem=problem)
        elif raw.strip():
            yield _json_row(raw.rstrip(b"\r\n"), line)


def _lines(stream: io.BufferedReader, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines with their numbers; None for one that is longer than any record."""
    number = 0
    while raw := stream.readline(max_bytes + 1):
        number += 1
        if len(raw) <= max_bytes:
            yield number, raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = stream.readline(max_bytes + 1)
        yield number, None


def _json_row(raw: bytes, line: int) -> Row:
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        problem = _TOO_DEEP
    except ValueError as error:
        problem = f"not valid JSON: {error}"
    else:
        return _as_row(value, number=line, line=line, what="line")
    return Row(number=line, line=line, problem=problem)


def _as_row(value: object, *, number: int, line: int, what: str) -> Row:
    if isinstance(value, dict):
        return Row(number=number, line=line, fields=value)
    return Row(number=number, line=line, problem=f"the {what} is not a JSON object")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _json_rows(stream: io.BufferedReader, max_row_bytes: int) -> Iterator[Row]:
    """Yield the rows of a `.json` file that is no list: columns, one record, or JSON lines."""
    raw = stream.read()
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        yield from _line_rows(_started(io.BytesIO(raw))[0], max_row_bytes)
        return
    line = 1 + raw[: len(raw) - len(raw.lstrip())].count(b"\n")
    for number, record in enumerate(_records_of(value), start=1):
        yield _as_row(record, number=number, line=line, what="input")


def _records_of(value: Any) -> list[Any]:
    """Return the records of a JSON value, which holds columns or a list, or is a record."""
    if not isinstance(value, dict) or not value:
        return [value]
    columns = list(value.values())
    if len(columns) == 1 and _is_full(columns[0], dict):  # {"data": [{...}, ...]}
        return list(columns[0])
    lists = [column for column in columns if isinstance(column, list)]
    if len(lists) == len(columns) > 1 and len(set(map(len, lists))) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]
    # Columns as pandas writes them: {"question": {"0": ..., "1": ...}}
    if _is_full(columns, dict) and all(c.keys() == columns[0].keys() for c in columns):
        return [{name: value[name][row] for name in value} for row in columns[0]]
    return [value]


def _is_full(values: object, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, kind) for v in values)


class _JsonList:
    """The values of a JSON list, decoded one after the other as the stream goes on."""

    def __init__(self, stream: io.BufferedReader, max_row_bytes: int) -> None:
        self._stream = stream
        self._max_row = max_row_bytes
        self._decoder = json.JSONDecoder(parse_constant=self._note_constant)
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at = "", 0
        self._line, self._number = 1, 0
        self._constant = ""
        self._ended = False

    def rows(self) -> Iterator[Row]:
        """Yield them; an error of syntax ends the list, because nothing tells where it goes on."""
        try:
            self._expect("[")
            if self._peek() != "]":
                yield self._row()
                while self._peek() != "]":
                    self._expect(",")
                    yield self._row()
            self._expect("]")
            if self._peek():
                raise ValueError("text behind the end of the list")
        except UnicodeDecodeError:
            yield self._broken("not UTF-8")
        except json.JSONDecodeError as error:
            self._line += self._text.count("\n", self._at, error.pos)
            yield self._broken(f"not valid JSON: {error.msg}")
        except RecursionError:
            yield self._broken(_TOO_DEEP)
        except ValueError as error:
            yield self._broken(f"not valid JSON: {error}")

    def _row(self) -> Row:
        self._peek()
        self._constant = ""
        value, end = self._value()
        self._number += 1
        number, line = self._number, self._line
        self._move(end)
        if self._constant:
            problem = f"not valid JSON: {self._constant} is no JSON number"
            return Row(number=number, line=line, problem=problem)
        return _as_row(value, number=number, line=line, what="record")

    def _value(self) -> tuple[object, int]:
        """Decode the value that comes next, reading on for as long as it is not whole."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or (
                    error.pos >= len(self._text) - _LONGEST_WORD
                )
                if self._ended or not is_cut:
                    raise
            else:
                # A number may go on in the next piece.
                if end < len(self._text) or self._ended:
                    return value, end
            size = len(self._text) - self._at
            if size > self._max_row:
                raise ValueError(f"a record of more than {self._max_row} characters")
            self._read(max(_PIECE, size))

    def _peek(self) -> str:
        """Return the next character that is no white space; empty at the end."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in " \t\r\n":
                end += 1
            self._move(end)
            if end < len(self._text) or self._ended:
                return self._text[end : end + 1]
            self._read(_PIECE)

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise ValueError(f"expecting {mark!r}")
        self._move(self._at + 1)

    def _read(self, size: int) -> None:
        raw = self._stream.read(size)
        self._ended = len(raw) < size
        self._text = self._text[self._at :] + self._decode.decode(raw, final=self._ended)
        self._at = 0

    def _move(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _note_constant(self, name: str) -> None:
        self._constant = name

    def _broken(self, problem: str) -> Row:
        problem += "; nothing behind it can be read"
        # It stands for the next record: the one before it may be sound.
        return Row(number=self._number + 1, line=self._line, problem=problem)


def _csv_rows(
    stream: io.BufferedReader, suffix: str, columns: Sequence[str] | None, max_row_bytes: int
) -> Iterator[Row]:
    # The limit is the process's own; it only ever grows.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    lines = _CsvLines(stream, max_row_bytes)
    rows = csv.reader(lines, delimiter=_delimiter(lines, suffix), strict=True)
    number = 0
    while True:
        line = lines.begin_row()
        problem, cells = "", []
        try:
            cells = next(rows)
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            problem = f"not valid CSV: {error}"
            # A quote that is not closed would take the rows behind it along.
            lines.give_back_all_but_first()
        if columns is None:
            columns = [cell.strip() for cell in cells]
            if problem := problem or _bad_head(columns):
                yield Row(number=1, line=line, problem=problem)
                return
        elif cells or problem:
            number += 1
            yield _csv_row(cells, columns, problem, number=number, line=line)


def _delimiter(lines: _CsvLines, suffix: str) -> str:
    head = lines.first()
    if suffix == ".tsv" or ("\t" in head and "," not in head):
        return "\t"
    return ";" if ";" in head and "," not in head else ","


class _CsvLines:
    """The lines of a CSV file as text; what is no UTF-8 becomes lone surrogates."""

    def __init__(self, stream: io.BufferedReader, max_row_bytes: int) -> None:
        self._lines = _lines(stream, max_row_bytes)
        self._left = self._max_row = max_row_bytes
        self._given_back: deque[str] = deque()
        self._row: list[str] = []
        self._number = 0

    def first(self) -> str:
        """Return the next line, which will be read again."""
        line = next(self, "")
        self._row, self._number = [line], self._number - bool(line)
        self._given_back.extend(filter(None, self._row))
        return line

    def begin_row(self) -> int:
        """Begin a row; returns the number of its line."""
        self._row, self._left = [], self._max_row
        return self._number + 1

    def give_back_all_but_first(self) -> None:
        """Let the lines of the row be read again, but for the first one."""
        self._given_back.extendleft(reversed(self._row[1:]))
        self._number -= len(self._row[1:])

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if self._given_back:
            line = self._given_back.popleft()
        else:
            _, raw = next(self._lines)
            # What is too long is refused below.
            line = " " * (self._max_row + 1) if raw is None else raw.decode("utf-8", _ESCAPED)
        self._number += 1
        self._row.append(line)
        self._left -= len(line)
        if self._left < 0:
            raise ValueError(f"a row of more than {self._max_row} characters")
        return line


def _bad_head(columns: Sequence[str]) -> str:
    twice = [name for i, name in enumerate(columns) if name in columns[:i]]
    if twice:
        return f"the first line names the column {twice[0]!r} twice"
    return "" if all(map(_is_text, columns)) else "not UTF-8"


def _csv_row(
    cells: Sequence[str], columns: Sequence[str], problem: str, *, number: int, line: int
) -> Row:
    if not problem and len(cells) != len(columns):
        problem = f"{len(cells)} values where the first line names {len(columns)} columns"
    if not problem and not all(map(_is_text, cells)):
        problem = "not UTF-8"
    fields = None if problem else dict(zip(columns, cells, strict=True))
    return Row(number=number, line=line, fields=fields, problem=problem)


def _is_text(cell: str) -> bool:
    return cell.isascii() or not any("\udc80" <= character <= "\udcff" for character in cell)


def _parquet_rows(source: BinaryIO, *, file: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise fail(
            "RM201",
            "reading Parquet needs pyarrow, which is not installed",
            file=file,
            hint="Install it with `pip install pyarrow`, or convert the file to JSON lines.",
        ) from error
    number = 0
    try:
        for batch in ParquetFile(source).iter_batches(batch_size=64):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number=number, line=number, fields=fields)
    except ArrowException as error:
        hint = "Download the file again."
        raise _unreadable(f"not Parquet: {error}", file=file, hint=hint) from error


def _unreadable(message: str, *, file: str, hint: str = f"Give {FORMATS}.") -> RecmasError:
    return fail("RM502", message, file=file, hint=hint)
