"""The parts of one build: each is taken from a store if it is there, and made if not.

What a part is made from is its inputs, which its caller names, and the conditions of the whole
build: versions, code, machine. Both are in its key. What was made is kept once the build has passed
all its checks.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeVar

from recmas_runtime.cache.settings import not_kept
from recmas_runtime.cache.store import CacheEntry, Store
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import reason_of, sha256_of
from recmas_runtime.core.text import counted
from recmas_runtime.formats.codec import from_json, to_json
from recmas_runtime.formats.manifest import FileEntry

T = TypeVar("T")

# `texts` is what prompts are made with, `engines` a backbone's graphs and weights, `case` what
# the reference gives for a parity case, `parity` what engines make of it.
Kind = Literal[
    "texts", "engines", "layers", "positions", "link", "graphs", "case", "parity", "loss"
]


class Reuse(NamedTuple):
    """How many parts a build has taken from its store, and made, by kind."""

    taken: dict[str, int]
    made: dict[str, int]

    @property
    def text(self) -> str:
        """Both in words, as one line."""
        return f"From the cache: {_listed(self.taken)}; made: {_listed(self.made)}."


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A part that this build has made."""

    key: str
    kind: Kind
    about: str
    files: Mapping[str, Path]  # by their names in the part
    data: Any


class BuildParts:
    """Gives the parts of a build whose files are under one folder.

    Args:
        store: None to make all of them.
        conditions: What all parts depend on, as JSON.
        root: The folder of the build; nothing else is in it at the end.
    """

    def __init__(
        self, store: Store | None, *, conditions: Mapping[str, object], root: Path
    ) -> None:
        self._store, self._root = store, root
        self._conditions = dict(conditions)
        self._hashing = ThreadPoolExecutor(1)  # beside what is made next
        self._digests: dict[str, Future[FileEntry] | FileEntry] = {}
        self._made: list[_Made] = []
        self._taken: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hashing.shutdown(cancel_futures=True)

    def value(
        self, kind: Kind, about: str, inputs: object, make: Callable[[], T], result: type[T]
    ) -> T:
        """Return a part without files; see `files`."""
        return self.files(kind, about, inputs, lambda _: make(), result, self._root)

    def files(
        self,
        kind: Kind,
        about: str,
        inputs: object,
        make: Callable[[Path], T],
        result: type[T],
        folder: Path,
    ) -> T:
        """Return what is said of a part; its files then are in a folder below the root.

        Args:
            about: What it is, in words.
            inputs: What this part depends on beside the conditions, as `to_json` takes it.
            make: Writes the files into an empty folder and returns what is to be said of them.
        """
        key = self._key(kind, inputs)
        with tempfile.TemporaryDirectory(dir=self._root, prefix=".part-") as name:
            staged = Path(name)
            found = self._found(key, staged, result)
            said = make(staged) if found is None else found[0]
            known = {} if found is None else found[1]
            placed: dict[str, Path] = {}
            for path in sorted(p for p in staged.rglob("*") if p.is_file()):
                relative = path.relative_to(staged)
                target = placed[relative.as_posix()] = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        for relative_name, path in placed.items():
            self._digests[path.relative_to(self._root).as_posix()] = known.get(
                relative_name
            ) or self._hashing.submit(_file_entry, path)
        if found is None:
            self._made.append(
                _Made(key=key, kind=kind, about=about, files=placed, data=to_json(said))
            )
        else:
            self._taken[kind] += 1
        return said

    def digest(self, path: Path) -> str:
        """Return the sha256 of a part's file."""
        return self._entry(path.relative_to(self._root).as_posix()).sha256

    def digests(self) -> dict[str, FileEntry]:
        """Return the size and sha256 of all files of parts, by path below the root."""
        return {name: self._entry(name) for name in self._digests}

    @property
    def reuse(self) -> Reuse:
        """What was taken and what was made."""
        return Reuse(dict(self._taken), dict(Counter(each.kind for each in self._made)))

    def keep(self, root: Path) -> tuple[Problem, ...]:
        """Keep what was made, from where the build's folder is now; return a warning if it fails.

        A build is none the worse without, so no error comes of it.
        """
        if self._store is None:
            return ()
        digests = self.digests()
        try:
            for each in self._made:
                paths = {name: p.relative_to(self._root) for name, p in each.files.items()}
                entry = CacheEntry(
                    kind=each.kind,
                    about=each.about,
                    files={name: digests[path.as_posix()] for name, path in paths.items()},
                    data=each.data,
                )
                self._store.keep(
                    each.key, entry, {name: root / path for name, path in paths.items()}
                )
        except OSError as error:
            reason = reason_of(error)
            message = f"what this build has made could not be kept for later ones: {reason}"
            return (not_kept(self._store.folder, message),)
        return ()

    def _key(self, kind: Kind, inputs: object) -> str:
        asked = {"kind": kind, "inputs": to_json(inputs), "conditions": self._conditions}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _found(
        self, key: str, staged: Path, result: type[T]
    ) -> tuple[T, Mapping[str, FileEntry]] | None:
        entry = None if self._store is None else self._store.find(key)
        if self._store is None or entry is None:
            return None
        try:
            said = from_json(result, entry.data, file=key)
        except RecmasError:  # other code than this has written it under this key
            self._store.forget(key)
            return None
        if not self._store.take(key, entry, staged):
            return None
        return said, entry.files

    def _entry(self, name: str) -> FileEntry:
        found = self._digests[name]
        if isinstance(found, Future):
            found = self._digests[name] = found.result()
        return found


def _file_entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256_of(path), size_bytes=path.stat().st_size)


_NAMES: dict[str, str] = {
    "texts": "tokenizer",
    "engines": "backbone",
    "layers": "choice of layers",
    "positions": "measure of positions",
    "link": "link",
    "graphs": "set of common graphs",
    "case": "parity case",
    "parity": "set of parity figures",
    "loss": "loss",
}


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(counted(n, _NAMES[kind]) for kind, n in numbers.items()) or "nothing"
