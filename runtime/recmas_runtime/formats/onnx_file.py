"""What an ONNX graph reads besides itself: the places of its external data, found without `onnx`.

Only the structure of the file is walked, message by message, as Protocol Buffers encode it:
https://protobuf.dev/programming-guides/encoding. Field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

import mmap
import os
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
        raw = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            return frozenset(_walk(raw, "model", 0))
        except (IndexError, ValueError):
            raise _no_graph(file) from None


def _no_graph(file: str) -> RecmasError:
    hint = "Copy the bundle again, or build it again."
    return fail("RM507", "this is not an ONNX graph", file=file, hint=hint)


def _walk(raw: memoryview, message: str, depth: int) -> Iterator[ExternalData]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    inner, entries = _MESSAGES[message], {}
    for number, part in _fields(raw):
        name = inner.get(number)
        if name == "entry":
            key, value = _entry(part)
            entries[key] = value
        elif name is not None:
            yield from _walk(part, name, depth + 1)
    if entries:
        offset, length = (int(entries.get(key, "0") or 0) for key in ("offset", "length"))
        yield ExternalData(entries.get("location", ""), offset, length)


def _entry(raw: memoryview) -> tuple[str, str]:
    parts = {
        number: bytes(part).decode("utf-8", "surrogateescape") for number, part in _fields(raw)
    }
    return parts.get(_KEY, ""), parts.get(_VALUE, "")


def _fields(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the fields of a message that have bytes, by number."""
    place = 0
    while place < len(raw):
        tag, place = _varint(raw, place)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, place = _varint(raw, place)
            continue
        if kind == _BYTES:
            size, place = _varint(raw, place)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:  # groups, which no version of ONNX has
            raise ValueError(f"wire type {kind}")
        if place + size > len(raw):
            raise ValueError("cut off")
        if kind == _BYTES:
            yield number, raw[place : place + size]
        place += size


def _varint(raw: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")
