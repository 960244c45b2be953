"""Plain text for people: tables, lists, counts and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

# What stands around a model's thinking, as families of models mark it.
THINKING_MARKS: Final = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>", "<channel|>"),
)


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return one line per row with columns padded to equal width; empty columns vanish."""
    listed_rows = [tuple(row) for row in rows]
    num_columns = max((len(row) for row in listed_rows), default=0)
    padded = [row + ("",) * (num_columns - len(row)) for row in listed_rows]
    widths = [max(map(len, column)) for column in zip(*padded, strict=True)]
    lines = []
    for row in padded:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width]
        lines.append("  ".join(cells).rstrip())
    return lines


def listed(words: Iterable[object]) -> str:
    """Return `a, b and c`."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def counted(count: int, noun: str) -> str:
    """Return `1 step` or `3 steps`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def time_left(seconds: float) -> str:
    """Return a time to go, rounded as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or else its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an aligned Markdown table; the first column is text, the others are figures."""
    cells = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * widths[0]}--", *(f"{'-' * width}-:" for width in widths[1:])]
    return "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])


def human_bytes(num_bytes: int | None) -> str:
    """Return a size with three digits and a decimal unit: `538 MB`; None is `unknown`."""
    if num_bytes is None:
        return "unknown"
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{num_bytes} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"
