"""Paths that a spec names."""

from __future__ import annotations

import os
from pathlib import Path


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
