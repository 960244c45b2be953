"""Folders that are filled beside their place and then renamed into it.

A build that is killed leaves a hidden folder that nothing loads; the next build recognises it,
because the kernel has released its lock, and removes it. Loading needs nothing of this module,
whose locks are those of POSIX.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

# `.NAME.building-XXXX` is a build under way, `.NAME.replaced-XXXX` a folder on its way out.
_BUILDING: Final = "building"
_REPLACED: Final = "replaced"


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target`; it is gone afterwards unless moved into place.

    Raises:
        OSError: If it cannot be made.
    """
    folder, lock = _locked_folder(target)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def move_into_place(folder: Path, target: Path) -> bool:
    """Rename a staged folder to its place; what is there steps aside first and is removed last.

    Returns:
        False, with nothing changed, if another build is replacing what is there.

    Raises:
        OSError: If it cannot be renamed; what was there is there again.
    """
    if not target.exists() or not any(target.iterdir()):
        folder.rename(target)  # onto an empty folder is allowed
        return True
    lock = _try_lock(target)  # keeps other builds from taking the old folder for a dead build's
    if lock is None:
        return False
    replaced = _beside(target, _REPLACED)
    try:
        target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)
    return True


def clear_away_dead_builds(folder: Path, names: str = "*") -> None:
    """Remove what killed builds left in a folder, and undo replacements cut off in the middle.

    Args:
        folder: Where the builds' targets are.
        names: A pattern for the names of the targets.
    """
    for what in (_REPLACED, _BUILDING):
        for left in sorted(folder.glob(f".{names}.{what}-*")):
            lock = _try_lock(left)
            if lock is None:
                continue
            target = left.with_name(left.name[1:].rpartition(f".{what}-")[0])
            if what == _REPLACED and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _locked_folder(target: Path) -> tuple[Path, int]:
    """Make a folder beside `target` and lock it; the lock goes when this process goes."""
    while True:
        folder = _beside(target, _BUILDING)
        folder.mkdir()
        try:
            lock = _try_lock(folder)
        except OSError:
            folder.rmdir()
            raise
        # Another build may take a folder for dead before it is locked.
        if lock is not None and folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}-{secrets.token_hex(4)}")


def _try_lock(folder: Path) -> int | None:
    """Lock a folder; None if it is gone or somebody else's.

    Raises:
        OSError: Where folders cannot be locked at all, as on some network file systems.
    """
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    return lock
