"""Buffers that engines read and write in place, on the host or on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.onnx.session import call_onnx, onnx_runtime

# numpy's types for those of ONNX Runtime. It has none for bfloat16, whose bits it can hold.
NUMPY_TYPES: Final[dict[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
_BFLOAT16: Final = 16  # its number among ONNX's types


class Memory:
    """Where the buffers of an engine live.

    Args:
        device: As ONNX Runtime names it.
        shared: The device's memory is the host's, so numpy reads and writes buffers in place. A
            device that is the host may still be told that it is not; it then does what others do.
    """

    def __init__(self, device: str, *, shared: bool) -> None:
        self.device = device
        self.shared = shared

    def zeros(self, shape: tuple[int, ...], kind: str = "tensor(float)") -> DeviceArray:
        """Return a buffer of zeros of one of `NUMPY_TYPES`."""
        return DeviceArray(np.zeros(shape, NUMPY_TYPES[kind]), kind, self)

    def hold(self, array: NDArray[Any], kind: str = "tensor(float)") -> DeviceArray:
        """Return a buffer with the contents of an array; where memory is shared, the array."""
        return DeviceArray(np.ascontiguousarray(array, NUMPY_TYPES[kind]), kind, self)


class DeviceArray:
    """A contiguous array at a fixed address, which binds to a graph's input or output.

    Where memory is shared it is a numpy array; elsewhere `write` and `numpy` copy over the bus and
    `copy` stays on the device.

    Args:
        array: Contents; with shared memory the buffer is this array itself.
        kind: One of `NUMPY_TYPES`, the array's own type.
        memory: Where the buffer lives.
    """

    def __init__(self, array: NDArray[Any], kind: str, memory: Memory) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.kind = kind
        self._memory = memory
        self._host = array if memory.shared else None
        # On the host the value points into the array, which must outlive it.
        self._value = _ort_value(array, kind)
        if not memory.shared:
            element = _BFLOAT16 if kind == "tensor(bfloat16)" else array.dtype.type
            make = onnx_runtime().OrtValue.ortvalue_from_shape_and_type
            self._value = call_onnx(make, array.shape, element, memory.device, 0)
            self.write(array)

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return math.prod(self.shape) * int(np.dtype(NUMPY_TYPES[self.kind]).itemsize)

    def write(self, array: NDArray[Any] | float) -> None:
        """Overwrite the buffer."""
        if self._host is not None:
            self._host[...] = array
        else:
            whole = np.empty(self.shape, NUMPY_TYPES[self.kind])
            whole[...] = array
            self._value.update_inplace(_ort_value(whole, self.kind))

    def copy(self, source: DeviceArray) -> None:
        """Overwrite the buffer with another one of the same place, shape and type."""
        if self._host is not None and source._host is not None:
            self._host[...] = source._host
        else:
            self._value.update_inplace(source._value)

    def take(self, array: NDArray[Any]) -> bool:
        """Overwrite the buffer if that is better than another buffer for this array.

        Returns:
            False where memory is shared, for an array is a buffer there, or if it does not fit.
        """
        if self._host is not None or array.shape != self.shape:
            return False
        self.write(array)
        return True

    def part(self, start: int, stop: int) -> DeviceArray:
        """Return entries `start` to `stop` of the first axis as a buffer over the same memory."""
        assert self._host is not None, "parts of a device's buffer have no handle"
        return DeviceArray(self._host[start:stop], self.kind, self._memory)

    def move_leading(self, rows: Sequence[int], positions: int) -> None:
        """Move rows of a buffer [R, H, C, D] to its beginning, the first `positions` of each.

        Args:
            rows: In ascending order, so that none is overwritten before it has moved.
            positions: The others of these rows keep what lay at the beginning before.
        """
        assert self._host is not None, "parts of a device's buffer have no handle"
        for place, row in enumerate(rows):
            if place != row:
                self._host[place, :, :positions] = self._host[row, :, :positions]

    def copy_leading(self, source: DeviceArray, rows: Sequence[int], positions: int) -> None:
        """Take rows of a buffer [R, H, C, D], the first `positions` of each, in this order."""
        array = self.numpy()
        array[:, :, :positions] = source.numpy()[rows, :, :positions]
        if self._host is None:
            self.write(array)

    def numpy(self) -> NDArray[Any]:
        """Return the contents: with shared memory the buffer itself, else a copy."""
        if self._host is not None:
            return self._host
        array = np.empty(self.shape, NUMPY_TYPES[self.kind])
        _ort_value(array, self.kind).update_inplace(self._value)
        return array

    def bind_input(self, binding: Any, name: str) -> None:
        """Make the graph's input `name` read from here."""
        call_onnx(binding.bind_ortvalue_input, name, self._value)

    def bind_output(self, binding: Any, name: str) -> None:
        """Make the graph's output `name` write here."""
        call_onnx(binding.bind_ortvalue_output, name, self._value)


class Series:
    """Arrays of one shape that are stored and loaded one by one, and read together.

    Args:
        memory: Where they live.
        initial: [N, ...], their contents.
        kind: One of `NUMPY_TYPES`.
    """

    def __init__(self, memory: Memory, initial: NDArray[Any], kind: str = "tensor(float)") -> None:
        self._whole = initial.astype(NUMPY_TYPES[kind]) if memory.shared else None
        # Slices of one device buffer have no handle of their own, so each array has its buffer.
        self._parts = [] if memory.shared else [memory.hold(part, kind) for part in initial]

    def store(self, index: int, source: DeviceArray) -> None:
        """Copy a buffer into one of the arrays."""
        if self._whole is not None:
            self._whole[index] = source.numpy()
        else:
            self._parts[index].copy(source)

    def load(self, index: int, target: DeviceArray) -> None:
        """Copy one of the arrays into a buffer."""
        if self._whole is not None:
            target.write(self._whole[index])
        else:
            target.copy(self._parts[index])

    def numpy(self) -> NDArray[Any]:
        """Return all of them, [N, ...]."""
        return (
            self._whole if self._whole is not None else np.stack([p.numpy() for p in self._parts])
        )


def _ort_value(array: NDArray[Any], kind: str) -> Any:
    """Return a value of ONNX Runtime that is the memory of an array."""
    ort_value = onnx_runtime().OrtValue
    if kind == "tensor(bfloat16)":
        return ort_value.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort_value.ortvalue_from_numpy(array)
