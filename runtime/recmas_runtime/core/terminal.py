"""What a terminal gets and sends: foreign text that cannot steer it, Ctrl-C that is not lost."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
