"""The human at the terminal, whom an answer agent can ask."""

from __future__ import annotations

import sys
from collections.abc import Callable

from recmas_runtime.core.terminal import harmless


def terminal_ask() -> Callable[[str], str] | None:
    """Return a function that asks on standard error and reads a line of standard input.

    None where either is no terminal: nobody would see the question.
    """
    return _ask if sys.stdin.isatty() and sys.stderr.isatty() else None


def _ask(question: str) -> str:
    print(f"\nThe agent asks: {harmless(question)}\n> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError("nobody answered: the input has ended")
    return line.strip()
