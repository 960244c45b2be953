"""safetensors files: an 8-byte header length, a JSON header, raw little-endian data.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from recmas_runtime.core.files import open_regular
from recmas_runtime.formats.codec import Size, StrictStruct, from_json, malformed, parse_json

Array = NDArray[Any]

# The format's own bound on its header.
MAX_HEADER_BYTES: Final = 100_000_000
# More than any real tensor has; numpy ends at 64.
_MAX_DIMS: Final = 32
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


class TensorEntry(StrictStruct, frozen=True, kw_only=True):
    """What a header says of a tensor; the offsets count from the start of the data."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        RecmasError: RM401 if it cannot be read, RM404 if it is malformed.
    """
    file = str(path)
    with open_regular(path, file=file) as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        raw = stream.read(min(num_bytes, MAX_HEADER_BYTES))
    try:
        # The library checks that shapes fit offsets, and offsets the file without holes.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in reason:
            reason = "the data are cut off, or go on behind the last tensor"
        raise malformed(file, reason) from None
    # What it lets pass: duplicate and unknown keys.
    header = cast("dict[str, object]", parse_json(raw, file=file))
    metadata = from_json(dict[str, str], header.pop("__metadata__", {}), file=file)
    tensors = from_json(dict[str, TensorEntry], header, file=file)
    return Header(tensors=tensors, metadata=metadata, data_start=8 + num_bytes)


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Map a safetensors file into memory, read-only.

    Returns:
        The tensors by name (bfloat16 widened to float32, which copies) and the metadata.

    Raises:
        RecmasError: RM401 if it cannot be read, RM404 if it is malformed.
    """
    header = read_header(path)
    for name, entry in header.tensors.items():
        if entry.dtype not in _DTYPES or len(entry.shape) > _MAX_DIMS:
            shown = f"{entry.dtype} with {len(entry.shape)} dimensions"
            raise malformed(str(path), f"tensor {name!r}: {shown} is not supported")
    # The library would copy every tensor, and knows no bfloat16 in numpy.
    data: NDArray[np.uint8] = np.empty(0, np.uint8)
    if path.stat().st_size > header.data_start:  # an empty file cannot be mapped
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=header.data_start)
    data.flags.writeable = False
    tensors: dict[str, Array] = {}
    for name, entry in header.tensors.items():
        flat = np.asarray(data[slice(*entry.data_offsets)])
        tensor = flat.view(_DTYPES[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":  # the upper half of a float32
            tensor = (tensor.astype(np.uint32) << np.uint32(16)).view(np.float32)
        tensors[name] = tensor
    return tensors, header.metadata


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
