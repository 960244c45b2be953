"""Findings about a spec: built at a position, with close names suggested, in reading order."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from recmas_compiler.spec.document.position import UNKNOWN, SourcePosition
from recmas_runtime.core.errors import Problem

# Values given on the command line have no line; their "file" is the argument itself.
SET_PREFIX = "--set "
_SHOWN_CHARACTERS = 40
_SHOWN_NAMES = 8


def problem_at(
    position: SourcePosition,
    code: str,
    message: str,
    *,
    hint: str = "",
    severity: Literal["error", "warning"] = "error",
) -> Problem:
    """Return a finding at `position`; without a place if that is `UNKNOWN`."""
    has_line = position != UNKNOWN and not position.file.startswith(SET_PREFIX)
    return Problem(
        code=code,
        message=message,
        hint=hint,
        severity=severity,
        file=None if position == UNKNOWN else position.file,
        line=position.line if has_line else None,
        column=position.column if has_line else None,
    )


def in_reading_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Sort by place in the file, `--set` arguments last as given; equal findings appear once."""

    def key(problem: Problem) -> tuple[bool, int, int, str]:
        if problem.line is None or problem.column is None:
            return (True, 0, 0, "")
        return (False, problem.line, problem.column, problem.code)

    return tuple(sorted(dict.fromkeys(problems), key=key))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that suggests the closest known name, or lists what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    if not names:
        return ""
    listed = ", ".join(f"`{n}`" for n in names[:_SHOWN_NAMES])
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return f"Known here: {listed}{more}."


def show(value: object) -> str:
    """Return a short form of an offending value for a message."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN_CHARACTERS else value[: _SHOWN_CHARACTERS - 3] + "..."
        return '"' + text.replace("\n", "\\n") + '"'
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence):
        return "a list"
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
