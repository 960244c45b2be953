"""Files that can be made again, kept under a digest of all that they were made from.

    entries/KEY.json   what an entry is, its data, and its files by name with size and sha256
    blobs/ab/abcd...   files, each named by its own sha256, so that entries share equal ones
    writing/           files on their way in
    lock               held while entries and blobs come and go

A file is compared with its name while it is copied out, an entry with the digest in its first line:
what is damaged is removed and counts as not there. Files that are used where they are, `files_of`,
are compared by size, and by digest where their user wants that. Files come in beside and are
renamed, so that a process which is killed leaves nothing that another one would take. Nothing here
is a program or is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import locked
from recmas_runtime.formats.codec import StrictStruct, from_json, parse_json, to_json
from recmas_runtime.formats.manifest import FileEntry

# Of entries, as they are written; part of every key.
FORMAT: Final = 1

# So much of a disk is left free: a cache must not be what stops other programs.
_LEFT_FREE_BYTES: Final = 2**29
_PIECE_BYTES: Final = 2**23
_DIGEST: Final = re.compile("[0-9a-f]{64}")


class CacheEntry(StrictStruct, frozen=True, kw_only=True):
    """What was made: files by name, and what is said of them as JSON.

    Attributes:
        kind: What it is, such as `engines`.
        about: Of what, in words.
    """

    kind: str
    about: str
    files: dict[str, FileEntry]
    data: Any


@dataclass(frozen=True, kw_only=True)
class Kept:
    """An entry in the store.

    Attributes:
        used_s: Time of its last use, in seconds since 1970.
        size_bytes: Of its files, which entries may share, and of what is said of them.
    """

    key: str
    entry: CacheEntry
    used_s: float
    size_bytes: int

    @property
    def digests(self) -> set[str]:
        """The files that it holds."""
        return {file.sha256 for file in self.entry.files.values()}


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed, and what is left."""

    num_removed: int
    freed_bytes: int
    left_bytes: int


class _DamagedError(Exception):
    """A file is not what it was, or is gone; the text is its path."""


class Store:
    """Entries in a folder, in the order of last use no more bytes than a limit."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._entries, self._blobs = folder / "entries", folder / "blobs"
        self._writing = folder / "writing"

    def find(self, key: str) -> CacheEntry | None:
        """Return an entry; None where there is none, or none that can be read."""
        path = self._entry(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        entry = _parsed(raw)
        if entry is None:
            with suppress(OSError):
                path.unlink()
        return entry

    def take(self, key: str, entry: CacheEntry, folder: Path) -> bool:
        """Copy an entry's files into a folder; it then counts as used.

        Returns:
            False where a file is damaged or gone; then the folder is as it was, and the entry is
            forgotten.

        Raises:
            OSError: The folder cannot be written to.
        """
        copied: list[Path] = []
        try:
            for name, file in entry.files.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with _opened(self._blob(file.sha256)) as source:
                    copied.append(target)
                    if copy_and_hash(source, target) != file:
                        raise _DamagedError(source.name)
        except _DamagedError as error:
            for target in copied:
                target.unlink(missing_ok=True)
            with suppress(OSError), self._locked():
                Path(str(error)).unlink(missing_ok=True)
                self._entry(key).unlink(missing_ok=True)
            return False
        with suppress(OSError):  # a store may be there to be read only
            os.utime(self._entry(key))
        return True

    def files_of(self, key: str, entry: CacheEntry) -> dict[str, Path] | None:
        """Return where an entry's files are, by name, to be read there; it then counts as used.

        Who has opened or mapped a file keeps it, also when the entry is removed.

        Returns:
            None where a file is gone or has another size; then the entry is forgotten.
        """
        if not all(map(self._has, entry.files.values())):
            self.forget(key)
            return None
        with suppress(OSError):
            os.utime(self._entry(key))
        return {name: self._blob(file.sha256) for name, file in entry.files.items()}

    def forget(self, key: str) -> None:
        """Remove an entry whose data are not what they should be."""
        with suppress(OSError):
            self._entry(key).unlink(missing_ok=True)

    def forget_file(self, key: str, file: FileEntry) -> None:
        """Remove a damaged file, and an entry that holds it."""
        with suppress(OSError), self._locked():
            self._blob(file.sha256).unlink(missing_ok=True)
            self._entry(key).unlink(missing_ok=True)

    def keep(self, key: str, entry: CacheEntry, paths: Mapping[str, Path]) -> None:
        """Keep copies of the files of an entry, unless they are more than the limit.

        Args:
            paths: Where the files are, by their names in the entry.

        Raises:
            OSError: The store cannot be written to, or its disk is nearly full.
        """
        size_bytes = sum(file.size_bytes for file in entry.files.values())
        if size_bytes > self.limit_bytes:
            return
        self._make_ready(size_bytes)
        with ExitStack() as stack:
            staged: dict[str, Path] = {}
            for name, file in entry.files.items():
                if file.sha256 in staged or self._has(file):
                    continue
                path = staged[file.sha256] = stack.enter_context(self._staged())
                with paths[name].open("rb") as source:
                    if copy_and_hash(source, path) != file:
                        return  # somebody changes the files meanwhile
            self.place(key, entry, staged)

    @contextmanager
    def room(self, number: int, *, size_bytes: int) -> Iterator[tuple[Path, ...]]:
        """Give paths for files that are written in the store itself, for `place`.

        Their names have as many characters as a digest. What is not placed is gone afterwards.

        Args:
            size_bytes: Of all of them, about.

        Raises:
            OSError: The store cannot be written to, or its disk is nearly full.
        """
        self._make_ready(size_bytes)
        with ExitStack() as stack:
            yield tuple(stack.enter_context(self._staged()) for _ in range(number))

    def place(self, key: str, entry: CacheEntry, staged: Mapping[str, Path]) -> None:
        """Put an entry in its place, with those of its files that are new, by digest.

        Raises:
            OSError: The store cannot be written to.
        """
        with self._staged() as written:
            written.write_bytes(_written(entry))
            with self._locked():
                for digest, path in staged.items():
                    self._blob(digest).parent.mkdir(exist_ok=True)
                    path.replace(self._blob(digest))
                # What was there before may have been evicted meanwhile.
                if all(map(self._has, entry.files.values())):
                    written.replace(self._entry(key))
                self._evict(self.limit_bytes, spared=key)

    def _make_ready(self, size_bytes: int) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (self._entries, self._blobs, self._writing):
            each.mkdir(exist_ok=True)
        if shutil.disk_usage(self.folder).free < size_bytes + _LEFT_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def entries(self) -> list[Kept]:
        """Return all entries that can be read, the one that was used last first."""
        found = []
        for path in self._entries.glob("*.json"):
            try:
                used_s, entry = path.stat().st_mtime, _parsed(path.read_bytes())
            except OSError:
                continue  # removed meanwhile
            if entry is not None:
                files = sum(file.size_bytes for file in entry.files.values())
                size_bytes = files + _size(path)
                found.append(Kept(key=path.stem, entry=entry, used_s=used_s, size_bytes=size_bytes))
        return sorted(found, key=lambda kept: (-kept.used_s, kept.key))

    def size_bytes(self) -> int:
        """Return the bytes of all entries, files that they share once."""
        paths = (*self._blobs.glob("*/*"), *self._entries.glob("*.json"))
        return sum(map(_size, paths))

    def prune(self, limit_bytes: int) -> Pruned:
        """Remove what was not used for longest until no more than a limit is left.

        Raises:
            OSError: The store cannot be written to.
        """
        if not self.folder.is_dir():
            return Pruned(num_removed=0, freed_bytes=0, left_bytes=0)
        with self._locked():
            before = self.size_bytes()
            num_removed = self._evict(limit_bytes)
        left = self.size_bytes()
        return Pruned(num_removed=num_removed, freed_bytes=before - left, left_bytes=left)

    def _evict(self, limit_bytes: int, *, spared: str | None = None) -> int:
        """Remove entries and what no entry holds any more; the lock is held."""
        self._clear_away_dead_writes()
        kept = self.entries()
        readable = {each.key for each in kept}
        damaged = [path for path in self._entries.glob("*.json") if path.stem not in readable]
        holders = Counter(digest for each in kept for digest in each.digests)
        for path in (*damaged, *(p for p in self._blobs.glob("*/*") if p.name not in holders)):
            path.unlink(missing_ok=True)
        num_removed, size_bytes = len(damaged), self.size_bytes()
        for each in reversed(kept):
            if size_bytes <= limit_bytes:
                break
            if each.key == spared:
                continue
            holders.subtract(each.digests)
            gone = [self._entry(each.key)]
            gone += [self._blob(digest) for digest in each.digests if not holders[digest]]
            for path in gone:
                size_bytes -= _size(path)
                path.unlink(missing_ok=True)
            num_removed += 1
        return num_removed

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        """Give a path for a file on its way in, locked as long as somebody writes it."""
        path = self._writing / secrets.token_hex(32)
        with ExitStack() as stack:
            with self._locked():
                path.touch()
                stack.enter_context(locked(path))
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

    def _clear_away_dead_writes(self) -> None:
        """Remove what killed processes were writing; the lock is held."""
        for path in self._writing.iterdir() if self._writing.is_dir() else ():
            with suppress(OSError), locked(path, wait=False):
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.folder / "lock"):
            yield

    def _entry(self, key: str) -> Path:
        return self._entries / f"{key}.json"

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest

    def _has(self, file: FileEntry) -> bool:
        path = self._blob(file.sha256)
        return path.is_file() and _size(path) == file.size_bytes


def copy_and_hash(source: Any, target: Path) -> FileEntry:
    """Copy an open file to a new one, or over an empty one; return its size and digest."""
    digest, size_bytes = hashlib.sha256(), 0
    with target.open("wb") as out, ThreadPoolExecutor(1) as hashing:
        while piece := source.read(_PIECE_BYTES):
            done = hashing.submit(digest.update, piece)
            out.write(piece)
            size_bytes += len(piece)
            done.result()
    return FileEntry(sha256=digest.hexdigest(), size_bytes=size_bytes)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open what is kept; whatever the system says of it, it cannot be taken."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise _DamagedError(str(path)) from error
    with stream:
        yield stream


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _written(entry: CacheEntry) -> bytes:
    """Return an entry as it is kept: a line with the digest of what follows, and JSON.

    Tables keep their order, which goes into manifests.
    """
    body = json.dumps(to_json(entry), allow_nan=False).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _parsed(raw: bytes) -> CacheEntry | None:
    digest, _, body = raw.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        entry = from_json(CacheEntry, parse_json(body, file="entry"), file="entry")
    except RecmasError:
        return None
    are_inside = all(map(_is_inside, entry.files))
    are_digests = all(_DIGEST.fullmatch(file.sha256) for file in entry.files.values())
    return entry if are_inside and are_digests else None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(name)
