"""How long-running work reports its progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol, TextIO

from recmas_runtime.core.terminal import harmless


class Advance(Protocol):
    """Counts finished units of a stage."""

    def __call__(self, num_units: int = 1, /, *, note: str = "") -> None:
        """Count `num_units` more units as done; `note` stands beside the count, if not empty."""


class Progress(Protocol):
    """Receives the progress of long-running work."""

    def stage(
        self, title: str, total: int | None = None, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units (None: not known), of which `done` are there already."""


class Silent:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        """Open a stage that shows nothing."""
        yield lambda num_units=1, *, note="": None


class LineProgress:
    """Keeps one line up to date on a terminal; shows nothing where there is none."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        """Open a stage whose line reads `TITLE 3/10`."""
        if not self._stream.isatty():
            with Silent().stage(title, total) as silent:
                yield silent
            return
        shown = done

        def advance(num_units: int = 1, /, *, note: str = "") -> None:
            nonlocal shown
            shown += num_units
            self._show(title, shown, total, note)

        self._show(title, shown, total, "")
        try:
            yield advance
        finally:
            self._write("\n")

    def _show(self, title: str, done: int, total: int | None, note: str) -> None:
        count = f" {done}/{total}" if total is not None else f" {done}" if done else ""
        count += f", {note}" if note else ""
        # \x1b[K clears what a longer line left behind.
        self._write(f"\r{harmless(title + count)}\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError):  # progress that nobody can see is none to stop for
            self._stream.write(text)
            self._stream.flush()
