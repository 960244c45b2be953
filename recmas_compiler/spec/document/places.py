"""Where every key and value of a YAML file stands, down to a piece of text inside of a block."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Loc = tuple[str | int, ...]
"""A path into the document, such as `("agents", "solver", "prompt")`."""


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


def position_of(source: str, index: int, file: str) -> SourcePosition:
    """Return line and column of a character of `source`."""
    line_start = source.rfind("\n", 0, index) + 1
    line = source.count("\n", 0, index) + 1
    return SourcePosition(file=file, line=line, column=index - line_start + 1)


@dataclass(frozen=True)
class Places:
    """The places of one document, by path.

    Attributes:
        source: The whole text, to find places inside of scalars.
        keys: Where the last key of a path stands.
        values: Where the value begins.
        spans: Of scalars: first and last index into `source`.
    """

    file: str
    source: str
    keys: dict[Loc, SourcePosition] = field(default_factory=dict)
    values: dict[Loc, SourcePosition] = field(default_factory=dict)
    spans: dict[Loc, tuple[int, int]] = field(default_factory=dict)

    def value(self, loc: Loc) -> SourcePosition:
        """Return where the value at `loc` begins, or else the nearest thing around it."""
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.values.get(loc, SourcePosition(file=self.file, line=1, column=1))

    def key(self, loc: Loc) -> SourcePosition:
        """Return where the key of `loc` stands, or else the nearest thing around it."""
        while loc and loc not in self.keys and loc not in self.values:
            loc = loc[:-1]
        return self.keys.get(loc) or self.value(loc)

    def inside(self, loc: Loc, text: str, start: int, length: int) -> SourcePosition:
        """Return where `text[start : start + length]` stands, `text` being the scalar at `loc`.

        YAML may fold and escape, so the same piece is looked up in the source: exact for blocks and
        for words on one line, otherwise the beginning of the scalar.
        """
        if loc not in self.spans:
            return self.value(loc)
        piece = text[start : start + length].split("\n")[0]
        earlier = text.count(piece, 0, start)
        low, high = self.spans[loc]
        at = low - 1
        for _ in range(earlier + 1):
            at = self.source.find(piece, at + 1, high)
            if at < 0:
                return self.value(loc)
        return position_of(self.source, at, self.file)

    def rename(self, parent: Loc, names: Mapping[str, str]) -> None:
        """Let everything known of a key of `parent` also hold for its new name."""
        depth = len(parent)
        tables: tuple[dict[Loc, Any], ...] = (self.keys, self.values, self.spans)
        for table in tables:
            for loc in [loc for loc in table if len(loc) > depth and loc[:depth] == parent]:
                if loc[depth] in names:
                    table[(*parent, names[str(loc[depth])], *loc[depth + 1 :])] = table[loc]

    def overwrite(self, loc: Loc, position: SourcePosition) -> None:
        """Forget `loc` and what is below it: it now comes from `position`."""
        for known in [known for known in self.values if known[: len(loc)] == loc]:
            self.keys.pop(known, None)
            self.values.pop(known, None)
            self.spans.pop(known, None)
        self.keys[loc] = position
        self.values[loc] = position


def path_of(name: str, base_dir: Path) -> Path:
    """Return the absolute path of what a spec names, relative to its folder; `~` is the home."""
    # os.path leaves an unknown `~user` as it is; pathlib raises
    return Path(base_dir, os.path.expanduser(name)).absolute()  # noqa: PTH111


def is_file(path: Path) -> bool:
    """Tell whether there is such a file; names that no file system allows are not there."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Tell whether there is such a folder; names that no file system allows are not there."""
    try:
        return path.is_dir()
    except OSError:
        return False
