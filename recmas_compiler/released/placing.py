"""Several files that appear together: written aside first, then moved to where they belong."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recmas_runtime.core.errors import fail

_SHOWN_NAMES = 3


def check_free(place: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse to write over files, unless the user wants that.

    Args:
        force: Existing files may be replaced; folders in their place may not.

    Raises:
        RecmasError: RM302 if something is there already.
    """
    found = [n for n in names if os.path.lexists(place / n)]
    taken = [n for n in found if not force or (place / n).is_dir()]
    if not taken:
        return
    listed = ", ".join(taken[:_SHOWN_NAMES])
    more = f" and {len(taken) - _SHOWN_NAMES} more" if len(taken) > _SHOWN_NAMES else ""
    verb = "exists" if len(taken) == 1 else "exist"
    hint = "Choose another --out." if force else "Choose another --out or pass --force."
    raise fail("RM302", f"{listed}{more} {verb} already", file=str(place), hint=hint)


@contextmanager
def placed_together(place: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a folder to write files in; move them to `place` if the body succeeds.

    Args:
        place: Where they go; made if it is not there.
        names: Every file, relative to the folder. The last one is moved last: where it is, all are.

    Raises:
        RecmasError: RM303 if the disk is full or not writable.
    """
    try:
        above = next(path for path in (place, *place.absolute().parents) if path.exists())
        staging = Path(tempfile.mkdtemp(prefix=".recmas-", dir=above))
        try:
            for name in names:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
            yield staging
            for name in names:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
            for name in names:
                (staging / name).replace(place / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise fail(
            "RM303",
            f"cannot write: {error.strerror or error}",
            file=str(error.filename or place),
            hint="Choose another --out or make room.",
        ) from error
