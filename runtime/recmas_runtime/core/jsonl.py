"""JSON lines that only grow: every line is whole or not there, whatever goes wrong."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self


class JsonLines:
    """A file of JSON values, one a line, to be appended to; standard output if `path` is None.

    Opening it changes nothing but to make it. What the disk refuses is raised as `OSError`: every
    user has an error code of its own for it.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = os.dup(1) if path is None else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Pipes and terminals keep no lines, and nothing can be taken back from them.
        self._is_regular = path is not None and stat.S_ISREG(os.fstat(self._file).st_mode)
        self._end: int | None = None if self._is_regular else 0

    def lines(self) -> Iterator[bytes]:
        """Yield the lines that are there; a last one that was cut off is left out."""
        if self._is_regular:
            with os.fdopen(os.dup(self._file), "rb") as stream:
                stream.seek(0)
                yield from (line for line in stream if line.endswith(b"\n"))

    def keep(self, num_bytes: int | None = None) -> None:
        """Cut off what lies behind `num_bytes` (None: nothing), and a line that is not whole."""
        if self._is_regular:
            there = os.fstat(self._file).st_size
            size = there if num_bytes is None else min(num_bytes, there)
            self._end = os.pread(self._file, size, 0).rfind(b"\n") + 1
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)

    def append(self, *values: object) -> None:
        """Append values, a line each: all of them or, with an error, none."""
        if self._end is None:
            self.keep()
        text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        # Half a surrogate pair becomes what it was where it came from: a JSON escape.
        content = text.encode("utf-8", "backslashreplace")
        try:
            rest = memoryview(content)
            while rest:  # a full disk may take a part and refuse the rest
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            if self._is_regular:
                self.keep(self._end)
            raise
        self._end = (self._end or 0) + len(content)

    def sync(self) -> int:
        """Bring the file to the disk; return its size."""
        if self._is_regular:
            os.fsync(self._file)
        return self._end or 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_json_lines(path: Path) -> Iterator[Any]:
    """Yield the values of a file; a last line that was cut off is left out."""
    with path.open("rb") as stream:
        yield from (json.loads(line) for line in stream if line.endswith(b"\n"))
