"""A folder of link files that is replaced as a whole: at every moment the old set or the new one.

A new set is written into a hidden folder beside it, synced, and exchanged with it in one rename.
Where that is not possible (other files lie in the folder, or the disk cannot), the new set becomes
`.next` in the folder: from then on it is the set of the folder. What is left is to move its files
over the old ones, the receipt last; whoever comes next finishes that if it was cut off.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import exclusive, sync_folder

RECEIPT_NAME: Final = "receipt.json"

_NEXT: Final = ".next"
_LINKS: Final = ".safetensors"
# Another training that is done at the same moment takes a second or two.
_LONGEST_WAIT_S: Final = 60.0
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


@contextmanager
def replaced_links(folder: Path, *, held: Path | None = None) -> Iterator[Path]:
    """Give a folder to write link files and their receipt in; they are the set of `folder` after.

    If the block fails, or the process is killed in it, the set before stays. Other files in the
    folder stay in any case.

    Args:
        held: A folder whose lock the caller has; links may go straight below it.

    Raises:
        OSError: If they cannot be written.
        RecmasError: RM302 if another process keeps the place locked.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    home = folder.parent if _can_be_renamed(folder) else folder
    is_held = held is not None and home == held.resolve()
    with nullcontext() if is_held else _locked(home):
        for left in home.glob(f".{folder.name}.writing-*"):  # a killed training's: we have a lock
            shutil.rmtree(left, ignore_errors=True)
        finish_replacing(folder)
        staged = home / f".{folder.name}.writing-{secrets.token_hex(4)}"
        try:
            staged.mkdir()
            yield staged
            sync_folder(staged)
            _put(staged, folder)
            sync_folder(home)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def finish_replacing(folder: Path) -> None:
    """Bring a new set into its place if that was cut off; two processes may do so at once.

    Raises:
        OSError: If it cannot be moved, as on a read-only disk.
    """
    pending = folder / _NEXT
    if not pending.is_dir():
        return
    names = [path.name for path in pending.iterdir()]
    for name in sorted(names, key=lambda name: (name == RECEIPT_NAME, name)):
        with suppress(FileNotFoundError):
            (pending / name).replace(folder / name)
    sync_folder(folder)
    with suppress(OSError):
        pending.rmdir()


def _can_be_renamed(folder: Path) -> bool:
    """Tell whether another folder can take its place: it may be a disk of its own."""
    above = folder.parent
    if not folder.is_dir():
        return True
    return os.access(above, os.W_OK | os.X_OK) and above.stat().st_dev == folder.stat().st_dev


def _put(staged: Path, folder: Path) -> None:
    there = list(folder.iterdir()) if folder.is_dir() else []
    if not there:
        staged.rename(folder)  # onto an empty folder is allowed
        return
    are_ours = all(
        path.is_file() and (path.suffix == _LINKS or path.name == RECEIPT_NAME) for path in there
    )
    if are_ours and _exchanged(staged, folder):
        return
    for path in staged.iterdir():
        if (folder / path.name).is_dir():
            raise IsADirectoryError(21, "a folder is in the place of a file", path.name)
    staged.rename(folder / _NEXT)
    sync_folder(folder)
    finish_replacing(folder)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    failed: int = rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return failed == 0


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    give_up = time.monotonic() + _LONGEST_WAIT_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(exclusive(folder, code="RM302", what="training"))
                break
            except RecmasError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
        yield
