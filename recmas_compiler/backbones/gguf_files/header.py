"""The header of a GGUF file: its key/value pairs, and where each tensor lies in it.

A file that holds something else than one whole model is told here, before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.files import reason_of

_ANEW: Final = "Download it again, and compare its size with the one where it came from."

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING, _ARRAY = 8, 9
# GGUF's value type -> struct format (little endian), from the format's specification
_NUMBERS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_USUAL_ALIGNMENT: Final = 32
_MOST_DIMENSIONS: Final = 4


@dataclass(frozen=True)
class TensorType:
    """How a type of tensors is stored: `block_bytes` for every `block_size` elements."""

    name: str
    block_size: int
    block_bytes: int


# GGUF's type of a tensor -> how it is stored; a test holds this against the package `gguf`.
TENSOR_TYPES: Final[Mapping[int, TensorType]] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    29: TensorType("IQ1_M", 256, 56),
    30: TensorType("BF16", 1, 2),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
}


class GgufError(Exception):
    """Why a GGUF file cannot be a backbone: a sentence's end that follows its name, and a hint."""

    def __init__(self, why: str, hint: str) -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shape: Outermost dimension first, as numpy counts; a file counts the other way round.
        begin: Offset of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    type_id: int
    begin: int

    @property
    def num_bytes(self) -> int:
        """Return the bytes it takes in the file."""
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says before its weights.

    Attributes:
        values: Its key/value pairs, lists whole.
        tensors: By name, in the file's order.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file that holds one whole language model.

    It is read once; again only if the file has changed.

    Raises:
        GgufError: It is no GGUF file, cut off, malformed, one part of several, or it holds
            something else: an adapter, a projector of images, a vocabulary alone.
    """
    header, size = _looked_up(path)
    _refuse_cut_off(header, size)
    return header


def read_values(path: Path) -> Mapping[str, Any]:
    """Return the key/value pairs of a file, or of the first part of one that is to be joined.

    Raises:
        GgufError: See `read_header`; what lies behind the header is not looked at.
    """
    return _looked_up(path)[0].values


def _looked_up(path: Path) -> tuple[GgufHeader, int]:
    try:
        found = path.stat()
        header = _read(path, (found.st_size, found.st_mtime_ns, found.st_ino))
    except OSError as error:
        raise GgufError(
            f"cannot be read: {reason_of(error)}", "Check the file's permissions."
        ) from error
    _refuse_other_contents(header)
    return header, found.st_size


@lru_cache(maxsize=4)
def _read(path: Path, stamp: tuple[int, ...]) -> GgufHeader:
    if stamp[0] < 24:
        raise GgufError("is no GGUF file: it is too short for one", _ANEW)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        if raw[:4] != _MAGIC:
            raise GgufError("is no GGUF file: it does not begin with `GGUF`", _ANEW)
        version, num_tensors, num_values = struct.unpack_from("<IQQ", raw, 4)
        if version not in _VERSIONS:
            big_endian = "; its numbers are big-endian" if version & 0xFFFF == 0 else ""
            raise GgufError(
                f"is of GGUF version {version}, which recmas does not read{big_endian}",
                "Convert it anew with a current llama.cpp.",
            )
        try:
            return _parse(path, _Cursor(raw, 24), num_values, num_tensors)
        except (struct.error, IndexError) as error:
            raise GgufError("is cut off: it ends within its header", _ANEW) from error
        except (UnicodeDecodeError, KeyError, OverflowError) as error:
            raise GgufError("has a malformed header", _ANEW) from error


def _parse(path: Path, at: _Cursor, num_values: int, num_tensors: int) -> GgufHeader:
    values = {}
    for _ in range(num_values):
        key = at.text()
        values[key] = at.value(at.number("I"))
    places = []
    for _ in range(num_tensors):
        name = at.text()
        num_dimensions = at.number("I")
        if num_dimensions > _MOST_DIMENSIONS:
            raise KeyError(num_dimensions)
        shape = tuple(reversed(at.numbers("Q", num_dimensions)))
        places.append((name, shape, at.number("I"), at.number("Q")))
    alignment = values.get("general.alignment", _USUAL_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise KeyError(alignment)
    begin = -(-at.place // alignment) * alignment
    tensors = {}
    for name, shape, type_id, offset in places:
        tensor_type = TENSOR_TYPES.get(type_id)
        if tensor_type is None:
            raise GgufError(
                f"has the tensor `{name}` of type {type_id}, which recmas cannot widen",
                f"Choose a file of another quantization: {_known_types()}.",
            )
        if shape[-1:] and shape[-1] % tensor_type.block_size:
            raise KeyError(shape)
        tensors[name] = TensorEntry(
            name=name, shape=shape, type=tensor_type, type_id=type_id, begin=begin + offset
        )
    return GgufHeader(path=path, values=values, tensors=tensors)


def _known_types() -> str:
    return ", ".join(each.name for each in TENSOR_TYPES.values())


def _refuse_other_contents(header: GgufHeader) -> None:
    values = header.values
    count = values.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        part = values.get("split.no", 0)
        raise GgufError(
            f"is part {part + 1 if isinstance(part, int) else '?'} of {count} of a model that is "
            "split over files",
            "Join them with llama.cpp (`llama-gguf-split --merge FIRST.gguf WHOLE.gguf`) and name "
            "the whole.",
        )
    kind = values.get("general.type", "model")
    architecture = values.get("general.architecture")
    if kind == "mmproj" or architecture == "clip":
        raise GgufError(
            "holds the projector of a model that sees (mmproj), not its language model",
            "Name the file of the language model, which usually lies beside it.",
        )
    if kind != "model":
        merge = "Merge the adapter into its model (llama.cpp: `llama-export-lora`) and name that."
        raise GgufError(
            f"holds no model but is of type `{kind}`",
            merge if kind == "adapter" else "Name the file of a whole model.",
        )
    if not isinstance(architecture, str):
        raise GgufError(
            "does not name its architecture (`general.architecture`)",
            "Convert the model anew with a current llama.cpp.",
        )
    if not header.tensors:
        raise GgufError(
            "holds a vocabulary alone, without weights", "Name the file of a whole model."
        )


def _refuse_cut_off(header: GgufHeader, size: int) -> None:
    for tensor in header.tensors.values():
        end = tensor.begin + tensor.num_bytes
        if end > size:
            raise GgufError(
                f"is cut off: `{tensor.name}` ends at byte {end:,}, the file at byte {size:,}",
                _ANEW,
            )


class _Cursor:
    """Reads one thing after the other; whatever lies beyond the end raises struct.error."""

    def __init__(self, raw: mmap.mmap, place: int) -> None:
        self._raw = raw
        self.place = place

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(code) * count
        if size > len(self._raw) - self.place:
            raise struct.error
        found = struct.unpack_from(f"<{count}{code}", self._raw, self.place)
        self.place += size
        return found

    def text(self) -> str:
        size = self.number("Q")
        begin, end = self.place, self.place + size
        if end > len(self._raw):
            raise struct.error
        self.place = end
        return self._raw[begin:end].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        item_kind, count = self.number("I"), self.number("Q")
        if item_kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[item_kind], count))
        if item_kind == _ARRAY:  # llama.cpp writes none; without end they would recurse
            raise KeyError(item_kind)
        return [self.value(item_kind) for _ in range(count)]
