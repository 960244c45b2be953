"""Which engines this user built: a plan is code to TensorRT, so others' are not loaded unasked.

A build leaves the digest of its `engines.json`, which has the hash of every plan, in a folder of
the user's: `$XDG_STATE_HOME/recmas/engines`, by default `~/.local/state/recmas/engines`. Nothing in
a bundle can claim to be there.
"""

from __future__ import annotations

import os
from pathlib import Path

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import sha256_of, write_whole


def remember_engines(record: Path) -> bool:
    """Note that this user built the engines of an `engines.json`; False where that cannot be."""
    try:
        folder = _state_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(folder / sha256_of(record), "")
    except (OSError, RuntimeError):  # RuntimeError: nobody knows the user's home
        return False
    return True


def are_own_engines(record: Path) -> bool:
    """Whether this user built the engines of an `engines.json`."""
    try:
        return (_state_folder() / sha256_of(record)).is_file()
    except (OSError, RuntimeError, RecmasError):
        return False


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    state = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"  # noqa: PTH117
    return state / "recmas" / "engines"
