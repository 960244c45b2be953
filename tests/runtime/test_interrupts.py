"""Ctrl-C in a finalizer: Python forgets it, the command lines do not."""

from __future__ import annotations

import sys
import time

import pytest

from recmas_runtime.core.terminal import lasting_interrupts


class Finalized:
    """Raises as it goes."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


def drop_and_go_on(seconds: float) -> None:
    """Lose an interrupt in a finalizer, and do something else."""
    Finalized(KeyboardInterrupt)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_an_interrupt_in_a_finalizer_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt), lasting_interrupts():
        drop_and_go_on(10)


def test_one_that_comes_too_late_is_not_raised_after_the_end() -> None:
    with lasting_interrupts():
        Finalized(KeyboardInterrupt)
    time.sleep(0.2)


def test_other_errors_are_told_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    before = sys.unraisablehook
    with lasting_interrupts():
        Finalized(ValueError)
    assert told == [ValueError]
    assert sys.unraisablehook is before
