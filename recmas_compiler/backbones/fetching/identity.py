"""What a folder's model is, wherever the folder lies: a digest of its files.

Weights are looked at in many places rather than read whole: a check of a spec must not wait for
gigabytes. Whatever training changes, it changes in more places than that.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final

# Files up to this size count byte by byte.
_WHOLE_BYTES: Final = 8 * 2**20
# Of larger ones so much at the beginning, where the names and shapes of the tensors stand, ...
_HEAD_BYTES: Final = 2**20
# ... and so many pieces of this size, evenly over the rest, the end among them.
_NUM_PIECES: Final = 512
_PIECE_BYTES: Final = 4096


def folder_identity(files: Sequence[Path]) -> str:
    """Return a digest of files by name, size and content, equal for every copy of them.

    Files that cannot be read count by name: whoever loads them says why.
    """
    return _identity(tuple(sorted((path, _stamp(path)) for path in files)))


def file_identity(path: Path) -> str:
    """Return a digest of one file by its size and content, equal for copies of any name."""
    return _file_identity(path, _stamp(path))


@lru_cache(maxsize=64)
def _file_identity(path: Path, stamp: tuple[int, ...]) -> str:
    return f"file:{_content(path)[:40]}"


@lru_cache(maxsize=64)
def _identity(stamped: tuple[tuple[Path, tuple[int, ...]], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in stamped:
        digest.update(f"{path.name} {_content(path)}\n".encode("utf-8", "backslashreplace"))
    return f"folder:{digest.hexdigest()[:40]}"


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                return "no file"
            digest.update(f"{found.st_size} ".encode())
            for offset, size in _pieces(found.st_size):
                digest.update(_read(stream, offset, size))
    except OSError:
        return "unreadable"
    return digest.hexdigest()


def _pieces(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= _WHOLE_BYTES:
        return [(0, num_bytes)]
    first, last = _HEAD_BYTES, num_bytes - _PIECE_BYTES
    steps = [first + (last - first) * number // (_NUM_PIECES - 1) for number in range(_NUM_PIECES)]
    return [(0, _HEAD_BYTES), *((offset, _PIECE_BYTES) for offset in steps)]


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)
