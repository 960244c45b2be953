"""A file that packages hold in parts, joined once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import cache_folder, locked, reason_of, sha256_of
from recmas_runtime.core.progress import Progress

_PIECE_BYTES: Final = 1 << 20
_MEGABYTE: Final = 1_000_000


def join_parts(
    parts: Sequence[Path], name: str, *, sha256: str, progress: Progress, title: str
) -> Path:
    """Return the path of the parts as one file in the cache folder; join them if it is not there.

    One process joins, others wait for it. Whoever looks finds no file or the whole one.

    Args:
        name: Of the joined file.
        sha256: Of the whole; a file that has another one is joined anew.
        title: What the progress says.

    Raises:
        RecmasError: RM200 if it cannot be written, or if the parts do not make this file.
    """
    folder = cache_folder()
    target = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{name}.lock"):
            if target.is_file() and sha256_of(target) == sha256:
                return target
            _join(parts, target, sha256, progress, title)
    except OSError as error:
        raise fail(
            "RM200",
            f"cannot write the joined model: {reason_of(error)}",
            file=str(target),
            hint="Free some space, or set XDG_CACHE_HOME to a folder that can be written.",
        ) from error
    return target


def _join(parts: Sequence[Path], target: Path, sha256: str, progress: Progress, title: str) -> None:
    staged = target.with_name(f".joining-{secrets.token_hex(4)}")
    total = sum(part.stat().st_size for part in parts)
    digest, done = hashlib.sha256(), 0
    try:
        with (
            progress.stage(f"{title}, MB", total // _MEGABYTE) as advance,
            staged.open("xb") as out,
        ):
            for piece in _pieces(parts):
                out.write(piece)
                digest.update(piece)
                before, done = done, done + len(piece)
                advance(done // _MEGABYTE - before // _MEGABYTE)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != sha256:
            raise fail(
                "RM200",
                f"the parts in {parts[0].parent} and beside it do not make the file with the "
                f"sha256 {sha256}",
                hint="Install the packages again: pip install --force-reinstall.",
            )
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


def _pieces(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece
