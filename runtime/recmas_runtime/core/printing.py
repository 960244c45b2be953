"""What programs print: data on stdout, notes on stderr; never what steers a terminal.

A stream that takes nothing is no bug: RM503 where data is lost, silence where notes are.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO

from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.terminal import shown_on


def write_out(text: str) -> None:
    """Write data to standard output at once.

    Raises:
        RecmasError: RM503 if it takes none.
        BrokenPipeError: If its reader went away (`| head`), who misses nothing.
    """
    try:
        sys.stdout.write(_encodable(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise
    except (OSError, ValueError) as error:  # ValueError: the stream was closed by its owner
        discard(sys.stdout)
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise fail(
            "RM503",
            f"cannot write to standard output: {reason}",
            hint="Make room, or write elsewhere.",
        ) from error


def note(text: str) -> None:
    """Print a line on standard error; if that takes none, nobody reads it."""
    try:
        print(_encodable(text, sys.stderr), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        discard(sys.stderr)


def envelope(*, ok: bool, data: Any, problems: Iterable[Problem]) -> str:
    """Return the one JSON object that `--json` prints, for success and failure alike."""
    body = {"ok": ok, "data": data, "problems": [problem.to_json() for problem in problems]}
    # On a terminal what is not ASCII is escaped: some of it would steer the terminal.
    return json.dumps(body, ensure_ascii=sys.stdout.isatty())


def discard(stream: TextIO) -> None:
    """Keep Python from reporting at its end what a stream did not take."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _encodable(text: str, stream: TextIO) -> str:
    """Return text as a stream takes it; what its encoding lacks is escaped."""
    encoding = stream.encoding or "utf-8"
    return shown_on(stream, text).encode(encoding, "backslashreplace").decode(encoding)
