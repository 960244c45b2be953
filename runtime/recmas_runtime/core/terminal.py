"""What the outside gets and sends: text that cannot steer a terminal, signals, closed streams."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, TextIO
from unicodedata import category

# Line breaks and tabs, and the joiners that scripts and emoji are spelled with.
_HARMLESS: Final = "\n\t\u200c\u200d"
_AGAIN_AFTER_S: Final = 0.05


def harmless(text: str) -> str:
    """Return text that cannot steer a terminal: control characters are shown, not sent."""
    # Of all spaces, only the ASCII one counts as printable.
    return "".join(
        c if c.isprintable() or c in _HARMLESS or category(c) == "Zs" else repr(c)[1:-1]
        for c in text
    )


def shown_on(stream: TextIO, text: str) -> str:
    """Return foreign text as it can be written to `stream`: harmless if that is a terminal."""
    return harmless(text) if stream.isatty() else text


@contextmanager
def lasting_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again where Python drops it.

    That is in a finalizer or a callback, where Python prints what is raised as ignored and the
    program goes on as if nobody had pressed a key.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def note(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # Later, because Python also drops what is raised in this hook.
        timer = threading.Timer(_AGAIN_AFTER_S, _thread.interrupt_main)
        timer.daemon = True
        again.append(timer)
        timer.start()

    sys.unraisablehook = note
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in again:
            timer.cancel()


@contextmanager
def end_signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP act as Ctrl-C, whatever that does at the moment.

    Clusters and containers send the one, a closed terminal the other; a program that leaves them to
    the system ends at once and cleans nothing up. A signal that is ignored stays ignored (`nohup`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    names = ("SIGTERM", "SIGHUP")  # Windows knows no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers}
    mine = [n for n in numbers if before[n] is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals that end a program wait until the block is left.

    Libraries that are not written in Python report an interrupted import as one that failed.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def open_standard_streams() -> None:
    """Put the null device where standard input, output or error is closed.

    Otherwise the first file that is opened takes the free number, and what belongs on the stream
    is written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
