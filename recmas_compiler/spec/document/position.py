"""Where in a spec file something stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, order=True)
class SourcePosition:
    """A place in a file.

    Attributes:
        file: As the user named it; `<string>` for specs that never were a file.
        line: From 1.
        column: From 1.
    """

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


UNKNOWN = SourcePosition(file="<unknown>", line=1, column=1)
