"""API keys: what they are like, and files of them."""

from __future__ import annotations

import os
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.text import human_bytes

_MAX_BYTES: Final = 64 * 2**10
_MIN_CHARS: Final = 8
_OF_OTHERS: Final = {
    stat.S_IRGRP | stat.S_IROTH: "read",
    stat.S_IWGRP | stat.S_IWOTH: "changed",
}


@dataclass(frozen=True, kw_only=True)
class KeyFile:
    """What a file of keys holds.

    Attributes:
        in_shell: What a POSIX shell replaces by the first key; empty where it cannot be read again.
    """

    keys: tuple[str, ...]
    in_shell: str


def read_key_file(file: Path, problems: list[Problem]) -> KeyFile:
    """Read keys, one a line; blank lines and those that begin with `#` hold none.

    Args:
        problems: Gets a warning where others than the owner can read or change the file.

    Raises:
        RecmasError: RM545 for a file that cannot be read or holds no key, and for a line that is
            none; no message shows a key.
    """
    hint = "Name a file with a key on a line."
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            raw = stream.read(_MAX_BYTES + 1)
            text = raw.decode("utf-8")
    except OSError as error:
        message = f"keys cannot be read: {reason_of(error)}"
        raise fail("RM545", message, hint=hint, file=str(file)) from None
    except UnicodeDecodeError:
        raise fail("RM545", "it holds no text", hint=hint, file=str(file)) from None
    if len(raw) > _MAX_BYTES:
        message = f"it is larger than {human_bytes(_MAX_BYTES)}"
        raise fail("RM545", message, hint=hint, file=str(file))
    lines = {n: line.strip() for n, line in enumerate(text.splitlines(), 1)}
    keys = {n: line for n, line in lines.items() if line and not line.startswith("#")}
    for number, key in keys.items():
        check_key(key, file=str(file), line=number)
    if not keys:  # somebody meant to have one
        hint = "Write one into it, or leave it away."
        raise fail("RM545", f"{file} holds no key", hint=hint, file=str(file))
    is_file = stat.S_ISREG(mode)
    how = " or ".join(what for bits, what in _OF_OTHERS.items() if mode & bits)
    if is_file and how:
        problems.append(
            Problem(
                code="RM545",
                severity="warning",
                message=f"the keys in {file} can be {how} by others than its owner",
                hint=f"Run: chmod 600 {shlex.quote(str(file))}.",
            )
        )
    first = next(iter(keys))
    command = f"sed -n {first}p {shlex.quote(str(file.absolute()))}"
    return KeyFile(keys=tuple(keys.values()), in_shell=f"$({command})" if is_file else "")


def check_key(key: str, *, file: str | None = None, line: int | None = None) -> None:
    """Refuse a key that no header can hold, or that is soon guessed.

    Raises:
        RecmasError: RM545.
    """
    if key.isascii() and key.isprintable() and len(key) >= _MIN_CHARS and " " not in key:
        return
    raise fail(
        "RM545",
        f"an API key is shorter than {_MIN_CHARS} characters, or has others than visible ASCII",
        hint="Make one with: python -c 'import secrets; print(secrets.token_hex(16))'.",
        file=file,
        line=line,
    )
