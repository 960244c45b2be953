"""A folder of link files that is replaced as a whole: at every moment the old set or the new one.

A new set is written into a hidden folder inside, synced, and renamed to `.next`: from then on it is
the set of the folder. What is left is to move its files over the old ones, the receipt last;
whoever comes next finishes that if it was cut off. Other files in the folder stay.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import exclusive, sync_folder

RECEIPT_NAME: Final = "receipt.json"

_NEXT: Final = ".next"
_WRITING: Final = ".writing-"
# Another training that is done at the same moment takes a second or two.
_LONGEST_WAIT_S: Final = 60.0


@contextmanager
def replaced_links(folder: Path) -> Iterator[Path]:
    """Give a folder to write link files and their receipt in; they are the set of `folder` after.

    If the block fails, or the process is killed in it, the set before stays.

    Raises:
        OSError: If they cannot be written.
        RecmasError: RM302 if another process keeps the folder locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for left in folder.glob(f"{_WRITING}*"):  # a killed training's: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        finish_replacing(folder)
        staged = Path(tempfile.mkdtemp(prefix=_WRITING, dir=folder))
        try:
            yield staged
            for path in staged.iterdir():
                if (folder / path.name).is_dir():
                    raise IsADirectoryError(21, "a folder is in the place of a file", path.name)
            sync_folder(staged)
            staged.chmod(0o755)  # a temporary folder is its owner's alone
            staged.rename(folder / _NEXT)
            sync_folder(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        finish_replacing(folder)


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
