"""Graphs with their weights packed for this processor, kept in the cache and mapped from there.

When a session opens, ONNX Runtime optimizes the graph and copies its weights into the layout that
the kernels of this processor read. It can write both to files, and then opens them without doing so
again: weights are mapped, so they take memory once for all processes that run the bundle, and only
as they are read. A bundle does not hold them, for they belong to one processor and one version of
ONNX Runtime.

    graph      what ONNX Runtime has made of the graph, naming the other file by its digest
    weights    its weights as the bundle has them, and packed

The weights of the bundle are hashed before they are kept, so that what is kept under their digest
was made of them; and what is kept gives the very numbers that the bundle's graph gives, or it is
noted that this one cannot be kept. When it is opened, the digest of the graph is checked and the
size of the weights; their digest too where hashes are to be verified. What does not pass is made
again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.cache.processor import processor
from recmas_runtime.cache.settings import not_kept
from recmas_runtime.cache.store import FORMAT, CacheEntry, Store
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import reason_of, sha256_of
from recmas_runtime.engines.onnx.caches import NUMPY_TYPES
from recmas_runtime.engines.onnx.session import (
    call_onnx,
    lasting_options,
    make_session,
    onnx_runtime,
)
from recmas_runtime.formats.bundle import Bundle, altered
from recmas_runtime.formats.manifest import FileEntry

if TYPE_CHECKING:
    import onnxruntime

KIND: Final = "packed"
GRAPH, WEIGHTS = "graph", "weights"
# Graphs with less are opened as they are: they are packed in milliseconds.
SMALLEST_BYTES: Final = 2**25

_IN_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_WRITTEN: Final = {
    "session.save_external_prepacked_constant_initializers": "1",
    # What is smaller stays in the graph.
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
_WRITTEN_NAME: Final = "session.optimized_model_external_initializers_file_name"
_REAL: Final = "tensor(float)"
# Weights are kept as they are too, for kernels that do not pack.
_GROWTH: Final = 2


class PackedGraphs:
    """Opens graphs of a bundle for ONNX Runtime's CPU provider by way of a store.

    Args:
        problems: Gets a warning where a graph could not be kept.
        verify_hashes: Compare packed weights with their digest whenever they are opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: Store,
        problems: list[Problem],
        *,
        verify_hashes: bool = False,
    ) -> None:
        self._bundle, self._store, self._problems = bundle, store, problems
        self._verify_hashes = verify_hashes
        self._hashing = ThreadPoolExecutor(1)  # while weights are packed
        self._digests: dict[str, str] = {}

    def open(
        self, graph: str, *, weights: str, threads: int | None
    ) -> onnxruntime.InferenceSession:
        """Open a graph; both files are named as the manifest does.

        Raises:
            RecmasError: RM401 if the weights are not those that the manifest lists, and what
                `make_session` raises.
        """
        path, files = self._bundle.file(graph), self._bundle.manifest.files
        size_bytes = files[weights].size_bytes
        if size_bytes < SMALLEST_BYTES or size_bytes * _GROWTH > self._store.limit_bytes:
            return make_session(path, threads=threads)
        key = _key(files[graph], files[weights])
        opened = self._kept(key, path, threads)
        if opened is not None:
            return opened
        try:
            with self._store.room(2, size_bytes=size_bytes * _GROWTH) as written:
                about = f"{graph} of {self._bundle.manifest.name}"
                return self._made(key, about, path, weights, threads, *written)
        except OSError as error:
            reason = reason_of(error)
        except RecmasError as error:
            if error.problems[0].code != "RM507":
                raise
            reason = error.problems[0].message
        # If that was not for writing, this fails as well.
        session = make_session(path, threads=threads)
        message = f"packed weights could not be kept for the next start: {reason}"
        problem = not_kept(self._store.folder, message)
        if problem not in self._problems:  # of another graph
            self._problems.append(problem)
        return session

    def _kept(
        self, key: str, path: Path, threads: int | None
    ) -> onnxruntime.InferenceSession | None:
        """Open what is kept; None where there is none that can be used."""
        entry = self._store.find(key)
        if entry is None:
            return None
        if not entry.files:  # it cannot be kept
            return make_session(path, threads=threads)
        places = self._store.files_of(key, entry)
        if places is None or places.keys() != {GRAPH, WEIGHTS}:
            return None
        try:
            graph = places[GRAPH].read_bytes()
            damaged = [GRAPH] if _entry_of(graph) != entry.files[GRAPH] else []
            if self._verify_hashes and sha256_of(places[WEIGHTS]) != entry.files[WEIGHTS].sha256:
                damaged.append(WEIGHTS)
        except (OSError, RecmasError):  # removed meanwhile
            return None
        for name in damaged:
            self._store.forget_file(key, entry.files[name])
        if damaged:
            return None
        try:
            return _open_written(path, graph, places[WEIGHTS].parent, threads)
        except RecmasError as error:
            if error.problems[0].code != "RM507":
                raise
            self._store.forget(key)
            return None

    def _made(
        self,
        key: str,
        about: str,
        path: Path,
        weights: str,
        threads: int | None,
        graph_file: Path,
        weights_file: Path,
    ) -> onnxruntime.InferenceSession:
        """Open a graph and keep what ONNX Runtime makes of it, if that computes the same."""
        checking = self._hashing.submit(self._check, weights)
        options = {**_WRITTEN, _WRITTEN_NAME: weights_file.name}
        session = make_session(path, threads=threads, options=options, write_optimized=graph_file)
        checking.result()
        about = f"{about}, ONNX Runtime {onnx_runtime().__version__}"
        expected = _answers(session)
        del session  # its weights are packed in memory of its own
        raw = graph_file.read_bytes()
        opened = _open_written(path, raw, weights_file.parent, threads)
        if not all(map(np.array_equal, _answers(opened), expected)):
            unusable = CacheEntry(kind=KIND, about=f"{about}: not kept", files={}, data=None)
            self._store.place(key, unusable, {})
            return make_session(path, threads=threads)
        # Later only the size is looked at, which after a power cut may be right and nothing there.
        with weights_file.open("rb+") as written:
            os.fsync(written.fileno())
        hashed = FileEntry(sha256=sha256_of(weights_file), size_bytes=weights_file.stat().st_size)
        # Both names have as many characters, so the lengths in the graph stay right.
        graph = raw.replace(weights_file.name.encode(), hashed.sha256.encode())
        graph_file.write_bytes(graph)
        files = {GRAPH: _entry_of(graph), WEIGHTS: hashed}
        entry = CacheEntry(kind=KIND, about=about, files=files, data=None)
        staged = {files[GRAPH].sha256: graph_file, hashed.sha256: weights_file}
        self._store.place(key, entry, staged)
        return opened

    def _check(self, weights: str) -> None:
        """Demand that weights are those that the manifest lists."""
        if weights not in self._digests:
            self._digests[weights] = sha256_of(self._bundle.file(weights))
        if self._digests[weights] != self._bundle.manifest.files[weights].sha256:
            raise altered(weights, "the file's SHA-256 is not the manifest's")


def _key(graph: FileEntry, weights: FileEntry) -> str:
    ort = onnx_runtime()
    made_from: Mapping[str, object] = {
        "format": FORMAT,
        "kind": KIND,
        "graph": graph.sha256,
        "weights": weights.sha256,
        "options": lasting_options(),
        "onnxruntime": [ort.__version__, ort.get_build_info()],
        "processor": processor(),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _open_written(
    path: Path, graph: bytes, folder: Path, threads: int | None
) -> onnxruntime.InferenceSession:
    """Open what ONNX Runtime has written, its weights in a folder."""
    options = {_IN_FOLDER: str(folder)}
    return make_session(path, threads=threads, options=options, optimized=graph)


def _answers(session: onnxruntime.InferenceSession) -> list[NDArray[Any]]:
    """Return what a graph makes of some numbers, for one position and for a prompt of two.

    ONNX Runtime does not align what it writes, and of weights that are not aligned some kernels
    (MatMulNBits) read others than were packed. With larger ones it comes out right by itself.
    """
    found: list[NDArray[Any]] = []
    for positions in (1, 2):
        sizes = {"positions": positions, "capacity": 2}
        inputs = {}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in value.shape]
            numbers = np.cos(np.arange(math.prod(shape))) if value.type == _REAL else np.zeros(1)
            inputs[value.name] = np.resize(numbers, shape).astype(NUMPY_TYPES[value.type])
        found += call_onnx(session.run, None, inputs)
    return found


def _entry_of(raw: bytes) -> FileEntry:
    return FileEntry(sha256=hashlib.sha256(raw).hexdigest(), size_bytes=len(raw))
