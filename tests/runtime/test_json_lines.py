"""JSON lines that only grow."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from recmas_runtime.core.jsonl import JsonLines, read_json_lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.jsonl"


def test_what_was_appended_is_read_back(path: Path) -> None:
    with JsonLines(path) as log:
        log.append({"a": 1})
        log.append("\u00e4", "half \ud800")
        assert log.sync() == path.stat().st_size
    assert list(read_json_lines(path)) == [{"a": 1}, "\u00e4", "half \ud800"]


def test_a_value_is_one_line_for_every_reader(path: Path) -> None:
    value = {"a\u2028b": "c\x85d\u2029e\r\nf"}
    with JsonLines(path) as log:
        log.append(value)
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == value


def test_a_pipe_is_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        list(read_json_lines(path))


def test_opening_changes_nothing_and_a_torn_line_goes_with_the_next_one(path: Path) -> None:
    path.write_bytes(b'1\n2\n{"to')
    with JsonLines(path) as log:
        assert list(log.lines()) == [b"1\n", b"2\n"]
        assert path.read_bytes() == b'1\n2\n{"to'
        assert list(read_json_lines(path)) == [1, 2]
        log.append(3)
    assert path.read_bytes() == b"1\n2\n3\n"


@pytest.mark.parametrize(("num_bytes", "kept"), [(0, b""), (3, b"1\n"), (4, b"1\n2\n"), (99, None)])
def test_only_whole_lines_are_kept(path: Path, num_bytes: int, kept: bytes | None) -> None:
    path.write_bytes(b"1\n2\n3\n")
    with JsonLines(path) as log:
        log.keep(num_bytes)
        log.append(4)
    assert path.read_bytes() == (b"1\n2\n3\n" if kept is None else kept) + b"4\n"


def test_a_full_disk_takes_all_of_a_line_or_none(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with JsonLines(path) as log:
        log.append("before")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
            with pytest.raises(OSError, match="File too large"):
                log.append("x", "y" * 30)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == b'"before"\n'
        log.append("after")
    assert list(read_json_lines(path)) == ["before", "after"]


def test_a_pipe_takes_lines_and_keeps_none(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with JsonLines(pipe) as log:
        log.keep(0)
        assert list(log.lines()) == []
        log.append({"a": 1})
        assert log.sync() == 9
        with pipe.open("rb") as stream:
            assert stream.readline() == b'{"a": 1}\n'


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with JsonLines(None) as log:
        log.append([1], [2])
    assert capfd.readouterr().out == "[1]\n[2]\n"
