"""Tables of records in every format, whole and damaged."""

from __future__ import annotations

import gzip
import io
import json
import sys
from typing import Any

import pytest

from recmas_runtime.core import tables
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.tables import Row, read_rows

RECORDS = [{"q": "one\ntwo", "a": "1"}, {"q": "x, \u00fc\u2028", "a": "2"}, {"q": "", "a": "3"}]
LINES = "\n".join(map(json.dumps, RECORDS))
# Without a time: test ids must not depend on when they are collected.
PACKED = gzip.compress(LINES.encode(), mtime=0)

CSV = 'q,a\n"one\ntwo",1\n"x, \u00fc\u2028",2\n,3\n'
COLUMNS = {name: [record[name] for record in RECORDS] for name in ("q", "a")}
PANDAS = {name: {str(i): value for i, value in enumerate(c)} for name, c in COLUMNS.items()}

FORMS = {
    "a.jsonl": LINES,
    "b.jsonl": f"\n{LINES}\n\n",
    "c.json": json.dumps(RECORDS, indent=1),
    "d.json": f"\n {json.dumps(RECORDS, ensure_ascii=False)} \n",
    "e.json": LINES,
    "f.json": json.dumps(COLUMNS),
    "g.json": json.dumps(PANDAS),
    "h.json": json.dumps({"data": RECORDS}),
    "<stdin>": LINES,
    "i.csv": CSV,
    "j.csv": CSV.replace("\n", "\r\n"),
    "k.csv": CSV.replace(",", ";").replace("x;", "x,"),
    "l.tsv": CSV.replace(",", "\t").replace("x\t", "x,"),
    "m.CSV": CSV,
}


def rows(text: str | bytes, file: str, **options: Any) -> list[Row]:
    raw = text.encode() if isinstance(text, str) else text
    return list(read_rows(io.BytesIO(raw), file=file, **options))


@pytest.mark.parametrize("file", FORMS)
def test_every_form_gives_the_same_records(file: str) -> None:
    wanted = [
        {k: v.replace("\n", "\r\n") if file == "j.csv" else v for k, v in r.items()}
        for r in RECORDS
    ]
    packed = gzip.compress(FORMS[file].encode())
    for found in (
        rows(FORMS[file], file),
        rows(b"\xef\xbb\xbf" + FORMS[file].encode(), file),
        rows(packed, f"{file}.gz"),
        rows(packed, file),
    ):
        assert [row.fields for row in found] == wanted
        assert {row.problem for row in found} == {""}


def test_numbers_and_lines() -> None:
    assert [(row.number, row.line) for row in rows(f"\n{LINES}", "a.jsonl")] == [
        (2, 2), (3, 3), (4, 4)
    ]  # fmt: skip
    assert [(row.number, row.line) for row in rows(CSV, "a.csv")] == [(1, 2), (2, 4), (3, 5)]
    listed = json.dumps(RECORDS, indent=1)
    assert [(row.number, row.line) for row in rows(listed, "a.json")] == [(1, 2), (2, 6), (3, 10)]


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("a.jsonl", '{"q": 1}\n{"q"\n[1]\n{"q": NaN}\n{"q": 2}', [1, "valid", "object", "NaN", 2]),
        ("a.jsonl", '[1]\n{"q": 2}', ["not a JSON object", 2]),
        ("a.jsonl", b'{"q": 1}\n{"q": "\xff"}\n{"q": 2}', [1, "not UTF-8 at byte 8", 2]),
        ("a.jsonl", '{"q": 1}\n{"q": "%s"}\n{"q": 2}' % ("x" * 5000), [1, "longer than 4096", 2]),
        ("a.json", '[{"q": 1}, 5, {"q": NaN}, {"q": 2}]', [1, "not a JSON object", "NaN", 2]),
        ("a.json", '[{"q": 1},\n{"q" 5}, {"q": 2}]', [1, "':' delimiter; nothing behind"]),
        ("a.json", '[{"q": 1}, {"q": "x', [1, "Unterminated string"]),
        ("a.json", '[{"q": 1} {"q": 2}]', [1, "expecting ','"]),
        ("a.json", '[{"q": 1}] {"q": 2}', [1, "text behind the end"]),
        ("a.json", '[{"q": 1}, {"q": "%s"}]' % ("x" * 200_000), [1, "more than 4096"]),
        ("a.json", b'[{"q": 1}, {"q": "\xff"}]', ["not UTF-8"]),
        ("a.json", "[]", []),
        ("a.json", "[{" + "[" * 100_000, ["not valid JSON"]),
        ("a.csv", "q\n1\n2,3\n4\n", ["1", "2 values where the first line names 1 columns", "4"]),
        ("a.csv", 'q,b\n1,x\n"2,y\n3,z\n4,v\n', ["1", "unexpected end", "3", "4"]),
        ("a.csv", 'q,b\n"2,y\n3,"z"\n4,v\n', ["',' expected after '\"'", "3", "4"]),
        ("a.csv", b"q\n1\n\xff\n2\n", ["1", "not UTF-8", "2"]),
        ("a.csv", 'q\n1\n"%s\n2\n' % ("x" * 5000), ["1", "more than 4096", "2"]),
        ("a.csv", "q,q\n1,2\n", ["'q' twice"]),
        ("a.csv", "", []),
    ],
)  # fmt: skip
def test_a_bad_row_costs_no_other(file: str, text: str | bytes, found: list[Any]) -> None:
    seen = rows(text, file, max_row_bytes=4096)
    assert len(seen) == len(found) == len({row.number for row in seen})
    for row, wanted in zip(seen, found, strict=True):
        if row.fields is None:
            assert str(wanted) in row.problem
        else:
            assert row.fields["q"] == wanted


def test_columns_of_a_file_that_does_not_name_them() -> None:
    found = rows("What?,x,y,A\n", "a.csv", columns=["question", "A", "B", "answer"])
    assert [row.fields for row in found] == [
        {"question": "What?", "A": "x", "B": "y", "answer": "A"}
    ]


def test_a_list_is_read_as_it_comes() -> None:
    records = [{"id": i, "text": "\u00fc" * (i % 700)} for i in range(2000)]
    text = json.dumps(records, ensure_ascii=False)
    assert [row.fields for row in rows(text, "a.json", max_row_bytes=2000)] == records


class Typed(io.RawIOBase):
    """Gives a byte at a time, and fails when more is asked for than is there."""

    def __init__(self, text: bytes) -> None:
        self.left = text

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self.left, "more was read than was needed"
        buffer[:1], self.left = self.left[:1], self.left[1:]
        return 1


def test_a_line_is_given_before_the_next_one_is_typed() -> None:
    found = read_rows(io.BufferedReader(Typed(b'\n{"q": 1}\n')), file="<stdin>")
    assert next(found).fields == {"q": 1}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.jsonl.gz", PACKED[:-12], "ended before"),
        ("a.jsonl.gz", PACKED[:20] + b"x" * 30, "cannot be read"),
        ("a.jsonl", LINES.encode("utf-16"), "UTF-16"),
    ],
)
def test_files_that_cannot_be_read(file: str, text: bytes, message: str) -> None:
    with pytest.raises(RecmasError, match="RM502") as refused:
        rows(text, file)
    assert message in str(refused.value)


def parquet() -> bytes:
    write = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed").write_table
    from pyarrow import Table

    stream = io.BytesIO()
    write(Table.from_pylist(RECORDS), stream)
    return stream.getvalue()


def test_parquet() -> None:
    for found in (
        rows(parquet(), "a.parquet"),
        rows(parquet(), "a"),
        rows(gzip.compress(parquet()), "a.parquet.gz"),
    ):
        assert [row.fields for row in found] == RECORDS
    with pytest.raises(RecmasError, match="RM502"):
        rows(parquet()[:-40], "a.parquet")


def test_parquet_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecmasError, match="RM201") as refused:
        rows(b"PAR1", "a.parquet")
    assert "pip install pyarrow" in refused.value.problems[0].hint


def test_a_long_record_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tables.MAX_ROW_BYTES == 2**24
    long = b'{"q": "' + b"x" * 2**25 + b'"}\n{"q": 1}\n'
    problem, good = rows(long, "a.jsonl")
    assert "longer than" in problem.problem
    assert good.fields == {"q": 1}
