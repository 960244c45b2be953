"""What foreign text may do to a terminal, and what pipes get."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recmas_runtime.cli.main import main
from recmas_runtime.core.terminal import harmless
from recmas_runtime.running.records import Answer
from recmas_runtime.running.system import System

HOSTILE = "red \x1b[31m, gone \x1b[2J\r, \x9b2J, \u202eback"
SHOWN = r"red \x1b[31m, gone \x1b[2J\r, \x9b2J, \u202eback"


@pytest.mark.parametrize(
    "text",
    ["def f():\n\treturn 1", "\u5341\u3000\u4e8c", "1\u00a0000", "\u0645\u06cc\u200c\u062e"],
)
def test_ordinary_text_of_any_language_is_shown_as_it_is(text: str) -> None:
    assert harmless(text) == text


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert harmless(HOSTILE) == SHOWN


@pytest.mark.parametrize(("is_terminal", "printed"), [(True, SHOWN), (False, HOSTILE)])
@pytest.mark.parametrize("with_trace", [False, True])
def test_only_a_terminal_gets_an_answer_spelled_out(
    hand_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_terminal: bool,
    printed: str,
    with_trace: bool,
) -> None:
    class Stream(list[str]):
        answer = None

    answer_all = System.answer_all

    def hostile_answers(*arguments: Any, **options: Any) -> list[Any]:
        answers = answer_all(*arguments, **options)
        return [replace(a, answer=HOSTILE) for a in answers if isinstance(a, Answer)]

    monkeypatch.setattr(System, "stream", lambda *_, **__: Stream([HOSTILE]))
    monkeypatch.setattr(System, "answer_all", hostile_answers)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    trace = ("--trace", str(tmp_path / "trace")) if with_trace else ()
    assert main(["run", str(hand_bundle), "7", *trace]) == 0
    assert capsys.readouterr().out == printed + "\n"
