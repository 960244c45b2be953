"""The judge sees what it is there to see, and lets a clean end pass."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import pytest

from faults.outcome import forked, judge
from recmas_runtime.core.errors import Exit, fail


def refuse() -> int:
    error = fail("RM404", "no plan", file="plan.json")
    print(error, file=sys.stderr)
    return error.exit_code


def crash() -> None:
    raise ValueError("a bug")


def printing(text: str, status: int = 0) -> Callable[[], int]:
    def act() -> int:
        print(text)
        return status

    return act


CLEAN: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "answer": printing("56"),
    "refusal": refuse,
    "interrupted": printing("interrupted", Exit.INTERRUPTED),
}
# name -> (what is done, part of what the judge says)
FAULTY: dict[str, tuple[Callable[[], object], str]] = {
    "traceback": (crash, "Traceback"),
    "internal error": (printing("internal error: ValueError", 1), "internal error"),
    "no code": (printing("it did not work", 1), "without a code"),
    "another code": (printing("error[RM404]: no", Exit.USAGE), "without a code"),
    "unknown status": (lambda: 17, "status 17"),
    "error as success": (printing("error[RM404]: no"), "status 0 after RM404"),
    "escape": (printing("\x1b[31mred"), "control characters"),
    "order of writing": (printing("a\u202eb"), "control characters"),
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    "crashed": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
    "waits": (lambda: time.sleep(60), "did not end"),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_ends(name: str) -> None:
    assert not judge(forked(CLEAN[name]))


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_ends(name: str) -> None:
    action, words = FAULTY[name]
    assert words in "; ".join(judge(forked(action, limit_s=3 if name == "waits" else 60)))


def test_a_crash_inside_a_library_is_let_pass_where_its_files_were_damaged() -> None:
    crashed = forked(FAULTY["crashed"][0])
    assert not judge(crashed, natively=True)
    assert judge(forked(FAULTY["killed"][0]), natively=True)


def test_data_may_hold_anything_but_on_a_terminal() -> None:
    assert not judge(forked(printing("\x1b[31m")), data_on_stdout=True)
    assert judge(forked(printing("\x1b[31m"), on_terminal=True), data_on_stdout=True)
