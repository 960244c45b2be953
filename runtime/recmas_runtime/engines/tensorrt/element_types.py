"""Host arrays in the element types of engines; numpy has no bfloat16 of its own."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# TensorRT's name of a type -> what stands for it on the host
HOST_TYPES: Final[dict[str, np.dtype[Any]]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}


def to_engine(array: NDArray[Any], element_type: str) -> NDArray[Any]:
    """Return a contiguous array of an engine's type; bfloat16 as its upper 16 bits."""
    if element_type != "BF16":
        return np.ascontiguousarray(array, HOST_TYPES[element_type])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    # Round to nearest, ties to even; a NaN must stay one when its lower bits are cut off.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, rounded).astype(np.uint16)


def from_engine(array: NDArray[Any], element_type: str) -> NDArray[Any]:
    """Return real numbers as float32, everything else as it is."""
    if element_type == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if element_type == "HALF" else array
