"""JSON lines that only grow: every line is whole or not there, whatever goes wrong."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

_BLOCK_BYTES: Final = 2**20
# JSON leaves these as they are; readers that split text at them, as str.splitlines does, would not
# find a value a line.
_LINE_ENDS: Final = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}


class JsonLines:
    """A file of JSON values, one a line, to be appended to; standard output if `path` is None.

    Opening it changes nothing but to make it. What the disk refuses is raised as `OSError`: every
    user has an error code of its own for it.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = os.dup(1) if path is None else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        # Pipes and terminals keep no lines, and nothing can be taken back from them.
        self.is_regular = path is not None and stat.S_ISREG(os.fstat(self._file).st_mode)
        self._end: int | None = None if self.is_regular else 0

    @property
    def size(self) -> int:
        """Bytes of a regular file; 0 for what keeps nothing."""
        return os.fstat(self._file).st_size if self.is_regular else 0

    def lines(self) -> Iterator[bytes]:
        """Yield the lines that are there; a last one that was cut off is left out."""
        if self.is_regular:
            with os.fdopen(os.dup(self._file), "rb") as stream:
                stream.seek(0)
                yield from (line for line in stream if line.endswith(b"\n"))

    def keep(self, num_bytes: int | None = None) -> None:
        """Cut off what lies behind `num_bytes` (None: nothing), and a line that is not whole."""
        if self.is_regular:
            size = self.size if num_bytes is None else min(num_bytes, self.size)
            self._end = self._end_of_lines(size)
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)

    def _end_of_lines(self, size: int) -> int:
        """Return where the last whole line within `size` bytes ends, looking from behind."""
        while size > 0:
            start = max(0, size - _BLOCK_BYTES)
            found = os.pread(self._file, size - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            size = start
        return 0

    def append(self, *values: object) -> None:
        """Append values, a line each: all of them or, with an error, none."""
        if self._end is None:
            self.keep()
        # A terminal gets escapes in place of characters that could steer it.
        escapes = not self.is_regular and os.isatty(self._file)
        text = "".join(json.dumps(value, ensure_ascii=escapes) + "\n" for value in values)
        # Half a surrogate pair becomes what it was where it came from: a JSON escape.
        content = text.translate(_LINE_ENDS).encode("utf-8", "backslashreplace")
        try:
            rest = memoryview(content)
            while rest:  # a full disk may take a part and refuse the rest
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            if self.is_regular:
                self.keep(self._end)
            raise
        self._end = (self._end or 0) + len(content)

    def sync(self) -> int:
        """Bring the file to the disk; return its size."""
        if self.is_regular:
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
    """Yield the values of a file; a last line that was cut off is left out.

    Raises:
        ValueError: A line is no JSON, or the file is a pipe or a device, which might never end.
        OSError: It cannot be opened.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield from (json.loads(line) for line in stream if line.endswith(b"\n"))
