"""What the program prints: one outcome on stdout, the rest on stderr."""

from __future__ import annotations

import sys
from typing import NoReturn

from recmas_runtime.core.errors import CODES, Exit, Problem, RecmasError
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.printing import discard, envelope, note, write_out

__all__ = ["envelope", "lose_output", "note", "report", "show"]


def show(text: str) -> None:
    """Print the outcome on stdout; the program ends where that cannot be."""
    try:
        write_out(f"{text}\n")
    except BrokenPipeError as error:
        lose_output(error)
    except RecmasError as error:
        note(str(error))
        sys.exit(error.exit_code)


def lose_output(error: OSError) -> NoReturn:
    """End the program whose stdout failed.

    A reader who went away (`| head`) is none who complains; anything else is RM503.
    """
    discard(sys.stdout)
    if isinstance(error, BrokenPipeError):
        sys.exit(Exit.OK)
    message = f"cannot write to standard output: {reason_of(error)}"
    note(str(Problem(code="RM503", message=message, hint="Make room, or write elsewhere.")))
    sys.exit(CODES["RM503"][0])


def report(problems: tuple[Problem, ...], *, as_json: bool) -> None:
    """Print problems: as an envelope on stdout, or as lines on stderr."""
    if as_json:
        show(envelope(ok=False, data=None, problems=problems))
        return
    for problem in problems:
        note(str(problem))
