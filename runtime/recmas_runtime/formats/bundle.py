"""Bundles on disk: opened with every check that needs no engine.

A bundle may come from anywhere. Nothing outside its folder is read, nothing but regular files is
opened, and nothing of it is used before sizes (and, on request, hashes) are what the manifest says.
The cache of Hugging Face is one folder in this sense: there a bundle is links into the files beside
it, and those are hashed whatever their size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import open_regular, sha256_of, write_whole
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.formats.codec import malformed, read_json_file
from recmas_runtime.formats.consistency import (
    check_consistency,
    graph_files,
    interpreted_files,
    referenced_files,
)
from recmas_runtime.formats.manifest import MANIFEST_NAME, PLAN_NAME, FileEntry, Manifest
from recmas_runtime.formats.onnx_file import external_data
from recmas_runtime.formats.plan import Plan

# Files below this are hashed at every load, and whatever their size graphs, tokenizers, chat
# templates and the plan: it takes milliseconds. Weights are hashed by `recmas verify`.
SMALL_FILE_BYTES: Final = 2**20
# Engines that were built on some machine are a cache beside what the manifest lists.
ENGINES_FOLDER: Final = "engines"
_COPY_AGAIN: Final = "Copy the bundle again, or build it again."


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle."""

    root: Path
    manifest: Manifest
    plan: Plan

    def file(self, relative: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            RecmasError: RM402 if it leaves the bundle, RM401 if it is missing or not listed.
        """
        if relative not in self.manifest.files:
            raise altered(relative, "the manifest does not list this file")
        path = inside(self.root, relative)
        if not os.path.isfile(path):  # noqa: PTH113 - any name, also one that no system takes
            raise altered(relative, "the file is missing")
        return path


def open_bundle(
    path: Path | str, *, verify_hashes: bool = False, progress: Progress | None = None
) -> Bundle:
    """Open a bundle and check that it is whole and makes sense.

    Without `verify_hashes` only small files and those that say what is done are hashed.

    Raises:
        RecmasError: RM400 if it is no bundle, RM401 for missing or altered files, RM402 for paths
            that leave it, RM403 if its format version is another, RM404 if manifest or plan are
            malformed or do not fit together. Everything of one kind is reported at once.
    """
    root = Path(path)
    # Names come from anywhere, also those that no system takes; pathlib would raise for them.
    if not os.path.isfile(root / MANIFEST_NAME):  # noqa: PTH113
        is_folder = os.path.isdir(root)  # noqa: PTH112
        reason = "has no manifest.json" if is_folder else "is not a folder"
        raise fail(
            "RM400",
            f"not a bundle: {root} {reason}",
            file=str(path),
            hint="Name a folder that `recmasc build` wrote; an interrupted build leaves none.",
        )
    manifest = read_json_file(Manifest, root / MANIFEST_NAME, file=MANIFEST_NAME)
    _check_files(root, manifest, verify_hashes=verify_hashes, progress=progress or Silent())
    _check_external_data(root, manifest)
    plan = read_json_file(Plan, inside(root, PLAN_NAME), file=PLAN_NAME)
    if problems := check_consistency(manifest, plan):
        raise RecmasError(problems)
    return Bundle(root=root, manifest=manifest, plan=plan)


def unlisted_files(bundle: Bundle) -> tuple[str, ...]:
    """Return files in the bundle's folder that its manifest does not know; not built engines."""
    known = bundle.manifest.files.keys() | {MANIFEST_NAME}
    found = sorted(
        path.relative_to(bundle.root).as_posix()
        for path in bundle.root.rglob("*")
        if not path.is_dir()
    )
    return tuple(f for f in found if f not in known and not is_engine_file(f))


def is_engine_file(relative: str) -> bool:
    """Whether a path belongs to the cache of built engines, which no manifest lists."""
    return relative.startswith(f"{ENGINES_FOLDER}/")


def inside(root: Path, relative: str) -> Path:
    """Return `root / relative`, made sure that it is inside `root`, links followed.

    In a cache of Hugging Face it may lead into the cache's files.

    Raises:
        RecmasError: RM402.
    """
    parts = relative.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    # Backslashes, drive letters, NUL and half characters are in no name that the exporter writes.
    is_name = not any(c in "\\:\0" or "\ud800" <= c <= "\udfff" for c in relative)
    if not plain or not is_name:
        raise fail("RM402", f"path {relative!r} is not inside the bundle", file=MANIFEST_NAME)
    path = root / relative
    if _leads_out(root, path):
        blobs = _cache_files(root)
        if blobs is None or not Path(os.path.realpath(path)).is_relative_to(blobs):
            raise fail(
                "RM402",
                f"path {relative!r} leads out of the bundle by a link",
                file=relative,
                hint="Copy the bundle with the files that its links lead to, as `cp -rL` does.",
            )
    return path


def keep_out(root: Path, places: Mapping[str, str | Path | None]) -> None:
    """Refuse to write into a bundle, whose files may be mapped, and where builds allow no others.

    Args:
        root: A folder that may be no bundle, which is then found out later.
        places: What would be written, by the option that names it; None for nothing.

    Raises:
        RecmasError: RM506.
    """
    if not os.path.isfile(root / MANIFEST_NAME):  # noqa: PTH113 - any name
        return
    for option, place in places.items():
        # NUL in a name is refused where the file is opened.
        if place is None or "\0" in str(place):
            continue
        if any(end.is_relative_to(os.path.realpath(root)) for end in _ends(Path(place))):
            raise fail(
                "RM506",
                f"{option} {place} is inside the bundle {root}",
                hint="Name a place outside of it: a bundle holds what its build wrote, no more.",
            )


def keep_out_of_any(option: str, place: Path) -> None:
    """Refuse to write into whatever bundle a place lies in, also where the file there is a link.

    Raises:
        RecmasError: RM506.
    """
    if "\0" in str(place):  # refused where the file is opened
        return
    for whole in _ends(place):
        for folder in whole.parents:
            if os.path.isfile(folder / PLAN_NAME):  # noqa: PTH113 - any name
                keep_out(folder, {option: whole})


def _leads_out(root: Path, path: Path) -> bool:
    # realpath, because Path.resolve does not take links in a circle
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _ends(path: Path) -> tuple[Path, Path]:
    """Return where a path leads, and where its name lies: files are written beside, or replace."""
    return Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name)


def _cache_files(root: Path) -> Path | None:
    """Return the folder `blobs` of a cache of Hugging Face, if a folder lies in its `snapshots`."""
    for folder in Path(os.path.realpath(root)).parents:
        if folder.name == "snapshots":
            return Path(os.path.realpath(folder.parent / "blobs"))
    return None


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old contents or all of the new ones.

    Raises:
        OSError: If the file cannot be written; `path` is as it was.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, text)


def _check_files(
    root: Path, manifest: Manifest, *, verify_hashes: bool, progress: Progress
) -> None:
    """Check every listed file's place, kind, size and hash, and that nothing needed is unlisted."""
    problems: list[Problem] = []
    to_hash: list[tuple[str, FileEntry]] = []
    always = {*interpreted_files(manifest)}
    for relative, entry in manifest.files.items():
        try:
            with open_regular(inside(root, relative), file=relative) as stream:
                size_bytes = os.fstat(stream.fileno()).st_size
            if size_bytes != entry.size_bytes:
                raise altered(relative, f"{size_bytes} bytes, the manifest says {entry.size_bytes}")
        except RecmasError as error:
            problems += error.problems
            continue
        # What a link leads to is nobody's but its hash's.
        is_outside = _leads_out(root, root / relative)
        is_small = entry.size_bytes < SMALL_FILE_BYTES
        if verify_hashes or is_outside or is_small or relative in always:
            to_hash.append((relative, entry))
    for relative in referenced_files(manifest):
        if relative not in manifest.files:
            problems += altered(
                relative, "the manifest uses this file but does not list it"
            ).problems
    total = sum(entry.size_bytes for _, entry in to_hash)
    with (progress if verify_hashes else Silent()).stage("Hashing (bytes)", total) as advance:
        for relative, entry in to_hash:
            if sha256_of(root / relative) != entry.sha256:
                problems += altered(relative, "the file's SHA-256 is not the manifest's").problems
            advance(entry.size_bytes)
    if problems:
        raise RecmasError(problems)


def _check_external_data(root: Path, manifest: Manifest) -> None:
    """Check that what graphs read besides themselves are bytes of files that the manifest lists."""
    problems: list[Problem] = []
    for relative in graph_files(manifest):
        folder = relative.rpartition("/")[0]
        found = external_data(inside(root, relative), file=relative)
        places = {
            location: f"{folder}/{location}" if folder else location
            for location in {data.location for data in found}
        }
        outside = {location for location, place in places.items() if not _is_inside(root, place)}
        for data in found:
            place = places[data.location]
            if data.location in outside:
                problems += fail(
                    "RM402",
                    f"the graph reads {data.location!r}, which is not inside the bundle",
                    file=relative,
                    hint=_COPY_AGAIN,
                ).problems
                continue
            entry = manifest.files.get(place)
            if entry is None:
                message = f"the graph reads {place!r}, which the manifest does not list"
                problems += altered(relative, message).problems
            elif not 0 <= data.offset <= data.offset + data.length <= entry.size_bytes:
                problems += malformed(
                    relative,
                    f"the graph reads bytes {data.offset} to {data.offset + data.length} of "
                    f"{place!r}, which has {entry.size_bytes}",
                ).problems
    if problems:
        raise RecmasError(problems)


def _is_inside(root: Path, relative: str) -> bool:
    try:
        inside(root, relative)
    except RecmasError:
        return False
    return True


def altered(relative: str, message: str) -> RecmasError:
    """Return RM401 for a file that is not what the manifest says of it."""
    return fail("RM401", message, file=relative, hint=_COPY_AGAIN)
