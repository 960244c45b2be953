from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import exclusive, write_whole

OPEN_STREAMS = """
import sys
from recmas_runtime.core.terminal import open_standard_streams
open_standard_streams()
first = open(sys.argv[1], "w")
print("data")
print("progress", file=sys.stderr)
assert sys.stdin.read() == ""
first.close()

"""

ENDED = """
import os, signal, sys
from recmas_runtime.core.terminal import end_signals_interrupt
try:
    with end_signals_interrupt():
        os.kill(os.getpid(), int(sys.argv[1]))
        signal.pause()
except KeyboardInterrupt:
    print("cleaned up")
"""


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_second_writer_is_refused(tmp_path: Path, of_folder: bool) -> None:
    path = tmp_path
    if not of_folder:
        path = tmp_path / "answers.jsonl"
        path.touch()
    with exclusive(path, code="RM503", what="run"):
        again = exclusive(path, code="RM503", what="run")
        with pytest.raises(RecmasError, match=r"another run writes here") as caught, again:
            pass
        assert caught.value.problems[0].file == str(path)
    with exclusive(path, code="RM503", what="run"):
        pass


def test_a_file_is_the_old_one_or_all_of_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    write_whole(path, "first")
    write_whole(path, b"second")
    assert path.read_text() == "second"
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half a pair \ud800")
    assert path.read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_what_is_printed_on_a_closed_stream_lands_in_no_file(
    tmp_path: Path, closed: tuple[int, ...]
) -> None:
    path = tmp_path / "first"

    def close() -> None:
        for number in closed:
            os.close(number)

    done = subprocess.run(
        [sys.executable, "-c", OPEN_STREAMS, str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=close,
        check=False,
    )
    assert done.returncode == 0
    assert path.read_text() == ""
    assert done.stdout == ("" if 1 in closed else "data\n")
    assert done.stderr == ("" if 2 in closed else "progress\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_programs_act_as_ctrl_c(number: int) -> None:
    command = [sys.executable, "-c", ENDED, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "cleaned up\n"), done.stderr


def test_problems_cannot_steer_a_terminal() -> None:
    problem = Problem(code="RM111", message="unknown agent 'a\x1b]0;title\x07'", file="s\x9b.yaml")
    assert str(problem) == r"s\x9b.yaml: error[RM111]: unknown agent 'a\x1b]0;title\x07'"
