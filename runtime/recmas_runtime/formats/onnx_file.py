"""What an ONNX graph reads besides itself: the places of its external data, found without `onnx`.

Only the structure of the file is walked, message by message, as Protocol Buffers encode it:
https://protobuf.dev/programming-guides/encoding. Field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import open_regular

# message -> number of a field -> message that it holds; what cannot hold a tensor is left out.
_MESSAGES: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY: Final = 1
_KEYS: Final = re.compile(b"location|offset|length")
_VALUE: Final = 2
# Graphs within graphs; real ones have one or two.
_MAX_DEPTH: Final = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ExternalData(NamedTuple):
    """Where a tensor's bytes lie: a path beside the graph, and a range of bytes in it."""

    location: str
    offset: int
    length: int


def external_data(path: Path, *, file: str) -> frozenset[ExternalData]:
    """Return every place outside of itself that a graph reads.

    Raises:
        RecmasError: RM401 if it cannot be read, RM507 if it is no ONNX graph.
    """
    with open_regular(path, file=file) as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            raise _no_graph(file)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return frozenset(_walk(mapped, _Part("model", 0, len(mapped)), 0))
        except (IndexError, ValueError):
            raise _no_graph(file) from None


def _no_graph(file: str) -> RecmasError:
    hint = "Copy the bundle again, or build it again."
    return fail("RM507", "this is not an ONNX graph", file=file, hint=hint)


class _Part(NamedTuple):
    """A message within a file: the bytes from start to end."""

    message: str
    start: int
    end: int


def _walk(raw: mmap.mmap, part: _Part, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    inner, entries = _MESSAGES[part.message], {}
    for number, start, end in _fields(raw, part.start, part.end):
        name = inner.get(number)
        if name == "entry":
            key, value = _entry(raw, start, end)
            entries[key] = value
        # Most nodes have no external data, and walking all of them takes long.
        elif name is not None and _KEYS.search(raw, start, end):
            yield from _walk(raw, _Part(name, start, end), depth + 1)
    if entries:
        offset, length = (int(entries.get(key, "0") or 0) for key in ("offset", "length"))
        yield ExternalData(entries.get("location", ""), offset, length)


def _entry(raw: mmap.mmap, start: int, end: int) -> tuple[str, str]:
    parts = {
        number: raw[first:last].decode("utf-8", "surrogateescape")
        for number, first, last in _fields(raw, start, end)
    }
    return parts.get(_KEY, ""), parts.get(_VALUE, "")


def _fields(raw: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message that have bytes: number, start and end."""
    while place < end:
        tag, place = _varint(raw, place, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, place = _varint(raw, place, end)
            continue
        if kind == _BYTES:
            size, place = _varint(raw, place, end)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:  # groups, which no version of ONNX has
            raise ValueError(f"wire type {kind}")
        if place + size > end:
            raise ValueError("cut off")
        if kind == _BYTES:
            yield number, place, place + size
        place += size


def _varint(raw: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise ValueError("cut off")
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
