"""What the program prints: one outcome on stdout, the rest on stderr; never what steers a terminal.

A stream that takes nothing is no bug: RM503 where the outcome is lost, silence where notes are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from recmas_runtime.core.errors import CODES, Exit, Problem
from recmas_runtime.core.terminal import shown_on


def show(text: str) -> None:
    """Print the outcome on stdout; the program ends where that cannot be."""
    try:
        print(_encodable(text, sys.stdout), flush=True)
    except OSError as error:
        lose_output(error)


def lose_output(error: OSError) -> NoReturn:
    """End the program whose stdout failed.

    A reader who went away (`| head`) is none who complains; anything else is RM503.
    """
    _discard(sys.stdout)
    if isinstance(error, BrokenPipeError):
        sys.exit(Exit.OK)
    message = f"cannot write to standard output: {error.strerror}"
    note(str(Problem(code="RM503", message=message, hint="Make room, or write elsewhere.")))
    sys.exit(CODES["RM503"][0])


def note(text: str) -> None:
    """Print a line on stderr; if that takes none, nobody reads it."""
    try:
        print(_encodable(text, sys.stderr), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def envelope(*, ok: bool, data: Mapping[str, Any] | None, problems: tuple[Problem, ...]) -> str:
    """Return the one JSON object that `--json` prints, for success and failure alike."""
    body = {"ok": ok, "data": data, "problems": [p.to_json() for p in problems]}
    # On a terminal what is not ASCII is escaped: some of it would steer the terminal.
    return json.dumps(body, ensure_ascii=sys.stdout.isatty())


def report(problems: tuple[Problem, ...], *, as_json: bool) -> None:
    """Print problems: as an envelope on stdout, or as lines on stderr."""
    if as_json:
        show(envelope(ok=False, data=None, problems=problems))
        return
    for problem in problems:
        note(str(problem))


def _encodable(text: str, stream: TextIO) -> str:
    """Return text as a stream takes it; what its encoding lacks is escaped."""
    encoding = stream.encoding or "utf-8"
    return shown_on(stream, text).encode(encoding, "backslashreplace").decode(encoding)


def _discard(stream: TextIO) -> None:
    """Keep Python from reporting at its end what a stream did not take."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
