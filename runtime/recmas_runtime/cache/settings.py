"""Where the cache is and how large it may get, as the environment says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from recmas_runtime.cache.store import Store
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import cache_folder

FOLDER_VARIABLE: Final = "RECMAS_CACHE"
SIZE_VARIABLE: Final = "RECMAS_CACHE_SIZE"
OFF: Final = "off"
# Room for a dozen small models, or for a few of a billion parameters.
DEFAULT_SIZE: Final = "20 GB"

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) *(B|kB|MB|GB|TB)", re.IGNORECASE)
_UNITS: Final = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def user_store() -> Store | None:
    """Return the store of the environment: `RECMAS_CACHE`, no larger than `RECMAS_CACHE_SIZE`.

    It is `recmas/builds` in the user's cache folder unless told otherwise; None for `off`, for a
    user without a folder, and on a system without locks of files.

    Raises:
        RecmasError: RM305 for a size that is none, or something else than a folder in its place.
    """
    told = os.environ.get(FOLDER_VARIABLE, "")
    if told == OFF or os.name != "posix":
        return None
    limit_bytes = size_of(
        os.environ.get(SIZE_VARIABLE, "") or DEFAULT_SIZE, said_by=f"the variable {SIZE_VARIABLE}"
    )
    try:
        folder = Path(told).absolute() if told else cache_folder() / "builds"
    except RuntimeError:  # a user without a home
        return None
    if folder.exists() and not folder.is_dir():
        raise fail(
            "RM305",
            "this is no folder, so that no cache of builds can be there",
            file=str(folder),
            hint=f"Set {FOLDER_VARIABLE} to a folder, or to `{OFF}`.",
        )
    return Store(folder, limit_bytes=limit_bytes)


def not_kept(folder: Path, message: str) -> Problem:
    """Return the warning RM350 that something could not be kept; a message says what and why."""
    return Problem(
        code="RM350",
        severity="warning",
        message=message,
        file=str(folder),
        hint=f"Make room there, set {FOLDER_VARIABLE} to another folder, or set it to `{OFF}`.",
    )


def size_of(text: str, *, said_by: str) -> int:
    """Return the bytes of a size such as `20 GB`.

    Raises:
        RecmasError: RM305 for another text.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise _no_size(text, said_by)
    return round(float(found[1]) * _UNITS[found[2].lower()])


def _no_size(text: str, said_by: str) -> RecmasError:
    return fail(
        "RM305",
        f"{said_by} says {text!r}, which is no size",
        hint="Give a number with a unit, B, kB, MB, GB or TB, such as `20 GB`.",
    )
