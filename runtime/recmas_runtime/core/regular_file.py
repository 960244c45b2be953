"""Reading files that someone else wrote: regular files only, so that nothing ever hangs."""

from __future__ import annotations

import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from recmas_runtime.core.errors import fail


def open_regular(path: Path, *, file: str) -> BufferedReader:
    """Open a regular file for reading in binary mode.

    Args:
        path: Where it is.
        file: How messages name it.

    Raises:
        RecmasError: RM401 if it is missing, unreadable or anything but a regular file.
    """
    hint = "Copy or build the bundle again."
    try:
        # Opening a pipe or a device without O_NONBLOCK could wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise fail("RM401", "the file is missing", file=file, hint=hint) from None
    except OSError as error:
        raise fail(
            "RM401", f"the file cannot be read: {error.strerror}", file=file, hint=hint
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise fail("RM401", "this is not a regular file", file=file, hint=hint)
    return os.fdopen(descriptor, "rb")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a regular file, hexadecimal.

    Raises:
        RecmasError: RM401 if it cannot be read.
    """
    with open_regular(path, file=str(path)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
