"""Ctrl-C that is not lost."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_AGAIN_AFTER_S: Final = 0.05


@contextmanager
def lasting_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt again if it came where Python forgets it.

    The main thread may be in a finalizer or a callback just then. Python prints what is raised
    there as ignored, and the program goes on as if nobody had pressed a key.
    """
    before = sys.unraisablehook
    again: list[threading.Timer] = []

    def note(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # Later, for what is raised in this hook is forgotten, too.
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
