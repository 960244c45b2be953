"""Bundles on disk: written beside their place, complete, and then renamed into it.

Whatever happens at whatever moment, the place holds a whole bundle or none.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from msgspec import structs

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import (
    clear_away_dead_builds,
    move_into_place,
    sha256_of,
    staged_folder,
)
from recmas_runtime.core.text import human_bytes
from recmas_runtime.formats.bundle import is_engine_file
from recmas_runtime.formats.codec import read_json_file, to_json
from recmas_runtime.formats.manifest import MANIFEST_NAME, PLAN_NAME, SPEC_NAME, FileEntry, Manifest
from recmas_runtime.formats.plan import Plan

# What the file system itself needs, and what the estimate may have missed.
_SLACK_BYTES: Final = 32 * 2**20

_NOT_WRITABLE: Final = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ENOLCK,  # folders cannot be locked there
    errno.EOPNOTSUPP,
)


@dataclass(frozen=True)
class StagedBundle:
    """A bundle that is being written: in `folder`, where nothing else is, for `target`."""

    folder: Path
    target: Path

    def commit(
        self,
        manifest: Manifest,
        *,
        plan: Plan,
        spec_yaml: str,
        known: Mapping[str, FileEntry] | None = None,
    ) -> Manifest:
        """Write plan, spec and, last, the manifest; make all durable; put the bundle in its place.

        Returns the manifest as written: completed by `files`, every file's size and hash.

        Args:
            known: Size and hash of files that need not be read for them, by path in the bundle.
        """
        _write_json(self.folder / PLAN_NAME, plan)
        (self.folder / SPEC_NAME).write_text(spec_yaml, encoding="utf-8")
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = [path.relative_to(self.folder).as_posix() for path in files]
        entries = {
            name: (known or {}).get(name)
            or FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)
            for name, path in zip(names, files, strict=True)
        }
        complete = structs.replace(manifest, files=entries)
        for path in (*files, *(p for p in self.folder.rglob("*") if p.is_dir())):
            _sync(path)
        _write_json(self.folder / MANIFEST_NAME, complete)
        _sync(self.folder / MANIFEST_NAME)
        _sync(self.folder)
        check_target(self.target)  # it may have changed during a build of minutes
        if not move_into_place(self.folder, self.target):
            raise _exists(self.target, "is being replaced by another build")
        _sync(self.target.parent)
        return complete


@contextmanager
def staged_bundle(target: Path, *, needed_bytes: int) -> Iterator[StagedBundle]:
    """Give a folder to build in, beside `target`; it is gone afterwards unless committed.

    Raises:
        RecmasError: RM302 if anything is at `target` but an empty folder or a bundle, RM303 if the
            disk is full or not writable.
    """
    target = Path(os.path.realpath(target))  # pathlib's own raises what is no OSError at loops
    needed_bytes += _SLACK_BYTES
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_away_dead_builds(target.parent, glob.escape(target.name))
        check_target(target)
        if (free := _free_bytes(target.parent)) < needed_bytes:
            raise fail(
                "RM303",
                f"the bundle needs about {human_bytes(needed_bytes)}, but {target.parent} has "
                f"{human_bytes(free)} free.",
                hint="Free some space, or choose an output folder on another disk.",
            )
        with staged_folder(target) as folder:
            yield StagedBundle(folder, target)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        free = _free_bytes(target.parent)
        raise fail(
            "RM303",
            f"cannot write the bundle {target}: {error.strerror}; it needs about "
            f"{human_bytes(needed_bytes)}, {human_bytes(free)} are free.",
            hint="Free some space, or choose another output folder.",
        ) from error


def check_target(target: Path) -> None:
    """Raise RM302 if anything but an empty folder or unaltered bundle files is at `target`."""
    if not target.exists():
        # A link to what is not there yet is followed; one in a circle leads nowhere.
        if os.path.islink(os.path.realpath(target)):  # noqa: PTH114
            raise _exists(target, "is a link that leads in a circle")
        return
    if not target.is_dir():
        raise _exists(target, "is a file")
    if not any(target.iterdir()):
        return
    try:
        manifest = read_json_file(Manifest, target / MANIFEST_NAME, file=MANIFEST_NAME)
    except RecmasError:
        raise _exists(target, "is a folder with other things in it") from None
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    known = {*manifest.files, MANIFEST_NAME, *filter(is_engine_file, found)}
    others = sorted(found - known)
    if others:
        raise _exists(target, f"is a bundle with other files in it, such as {others[0]!r}")


def _exists(target: Path, what: str) -> RecmasError:
    return fail(
        "RM302",
        f"{target} {what}; it is left as it is.",
        hint="Name a folder that does not exist yet, is empty, or is a bundle to be replaced.",
    )


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems cannot sync folders; the files are what matters.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Plan | Manifest) -> None:
    text = json.dumps(to_json(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
