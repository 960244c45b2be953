"""safetensors files: an 8-byte header length, a JSON header, raw little-endian data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.regular_file import open_regular

Array = NDArray[Any]

# The format's own bound on its header.
MAX_HEADER_BYTES: Final = 100_000_000
# Data starts at a multiple of this, so that every tensor of whole cache lines is aligned.
_ALIGNMENT: Final = 64
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: widened to float32 by `read_tensors`
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Map a safetensors file into memory, read-only.

    Returns:
        The tensors by name (bfloat16 widened to float32, which copies) and the metadata.

    Raises:
        RecmasError: RM401 if it cannot be read, RM404 if it is malformed.
    """
    with open_regular(path, file=str(path)) as stream:
        size_bytes = stream.seek(0, 2)
        stream.seek(0)
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _malformed(path, f"{size_bytes} bytes are too few for a safetensors file")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise _malformed(path, f"a header of {header_bytes} bytes in {size_bytes} bytes")
        header, metadata = _parse_header(path, stream.read(header_bytes))
    start = 8 + header_bytes
    _check_layout(path, header, num_data_bytes=size_bytes - start)
    if size_bytes == start:  # nothing to map
        data: NDArray[np.uint8] = np.empty(0, np.uint8)
    else:
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
    tensors: dict[str, Array] = {}
    for name, (dtype, shape, first, last) in header.items():
        flat = np.asarray(data[first:last]).view(_DTYPES[dtype]).reshape(shape)
        tensors[name] = _widen_bfloat16(flat) if dtype == "BF16" else flat
    return tensors, metadata


def write_tensors(
    path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; equal tensors and metadata give equal bytes."""
    # Widest elements first keeps every tensor aligned to its own element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        dtype = tensors[name].dtype.newbyteorder("<")
        end = offset + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for name in names:
            dtype = tensors[name].dtype.newbyteorder("<")
            stream.write(np.ascontiguousarray(tensors[name], dtype=dtype).data)


# name -> (dtype, shape, first byte, byte after the last), offsets from the start of the data
_Header = dict[str, tuple[str, tuple[int, ...], int, int]]


def _parse_header(path: Path, raw: bytes) -> tuple[_Header, dict[str, str]]:
    try:
        parsed = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError):
        raise _malformed(path, "the header is not valid JSON") from None
    if not isinstance(parsed, dict):
        raise _malformed(path, "the header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not _is_text_table(metadata):
        raise _malformed(path, "`__metadata__` is not a table of strings")
    return {name: _parse_entry(path, name, entry) for name, entry in parsed.items()}, metadata


def _parse_entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(path, f"tensor {name!r}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _malformed(path, f"tensor {name!r}: element type {dtype!r} is not supported")
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and len(shape) <= 32):
        raise _malformed(path, f"tensor {name!r}: shape or data_offsets are not sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise _malformed(path, f"tensor {name!r}: {dtype}{shape} does not fill bytes {offsets}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _check_layout(path: Path, header: _Header, *, num_data_bytes: int) -> None:
    """Demand what the format promises: data without holes, overlaps or leftovers."""
    position = 0
    for name, (_, _, first, last) in sorted(header.items(), key=lambda item: item[1][2:]):
        if first != position:
            raise _malformed(path, f"tensor {name!r} starts at byte {first}, not at {position}")
        position = last
    if position != num_data_bytes:
        raise _malformed(path, f"tensors take {position} bytes of {num_data_bytes}")


def _widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    # A bfloat16 is the upper half of a float32.
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _is_text_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in cast("list[object]", value)
    )


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _malformed(path: Path, message: str) -> RecmasError:
    return fail("RM404", message, file=str(path), hint="Build or copy the file again.")
