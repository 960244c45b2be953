from __future__ import annotations

import io

import pytest

from recmas_runtime.core.progress import LineProgress, Silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_per_stage() -> None:
    stream = Terminal()
    progress = LineProgress(stream)
    with progress.stage("Hashing", 3) as advance:
        advance()
        advance(2)
    with progress.stage("Loading"):
        pass
    shown = stream.getvalue().replace("\x1b[K", "").split("\r")
    assert shown == ["", "Hashing 0/3", "Hashing 1/3", "Hashing 3/3\n", "Loading\n"]


def test_a_stage_may_go_on_and_have_a_note() -> None:
    stream = Terminal()
    with LineProgress(stream).stage("Training", 9, done=4) as advance:
        advance(note="loss 0.5")
        advance(2)
    shown = stream.getvalue().replace("\x1b[K", "").split("\r")
    assert shown == ["", "Training 4/9", "Training 5/9, loss 0.5", "Training 7/9\n"]


def test_without_a_terminal_nothing_is_shown() -> None:
    stream = io.StringIO()
    with LineProgress(stream).stage("Hashing", 3) as advance:
        advance(3)
    with Silent().stage("Hashing") as advance:
        advance()
    assert stream.getvalue() == ""


def test_a_stage_that_fails_ends_its_line() -> None:
    stream = Terminal()
    with pytest.raises(ValueError, match="broken"), LineProgress(stream).stage("Hashing"):
        raise ValueError("broken")
    assert stream.getvalue().endswith("\n")
