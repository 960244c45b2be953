"""Numbers of 16 bits on the host. numpy has no bfloat16: an array of uint16 holds its bits."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# numpy's types for element types by name. That of bfloat16 holds bits, which have the upper half of
# a float32's.
HOST_TYPES: Final[dict[str, Any]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
_HALF: Final = 16


def widened(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return an array of an element type as float32; arrays of other types as they are."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << _HALF).view(np.float32)
    return array.astype(np.float32) if dtype == "float16" else array


def narrowed(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return float32 numbers in an element type, to the nearest, of two the even one.

    An array that has the type already is returned as it is.
    """
    host = HOST_TYPES.get(dtype)
    if host is None or array.dtype == host:
        return array
    if dtype != "bfloat16":
        return np.asarray(array, host)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    odd = (bits >> _HALF) & 1
    rounded = (bits + 0x7FFF + odd) >> _HALF
    # Rounding up would make an infinity of what is not a number.
    broken = (bits >> _HALF) | 0x40
    return np.where(np.isnan(array), broken, rounded).astype(np.uint16)
