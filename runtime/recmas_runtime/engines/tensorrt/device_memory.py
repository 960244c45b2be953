"""Memory, a stream and captured graphs on the GPU, through CUDA's own Python bindings.

Imported only where `engine_cache` has found the bindings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from cuda.bindings import runtime as cudart
from numpy.typing import NDArray

from recmas_runtime.core.errors import fail

# TensorRT wants tensor addresses to be multiples of this.
_ALIGNMENT: Final = 256


@dataclass(frozen=True)
class Binding:
    """Where a tensor lies, and the shape it has there."""

    address: int
    shape: tuple[int, ...]


def check(result: tuple[Any, ...]) -> Any:
    """Return what a call gave besides its status: nothing, one value or several.

    Raises:
        RecmasError: RM507 if the call failed; RM504 would be too late for a missing device.
    """
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(error)
        raise fail(
            "RM507",
            f"CUDA: {text.decode()}",
            hint="Free GPU memory or take a smaller batch; --device cpu runs without a GPU.",
        )
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)


class Stream:
    """A stream of device work; all copies and launches of an engine go through one."""

    def __init__(self) -> None:
        # Graphs cannot be captured on the default stream.
        self._stream = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        weakref.finalize(self, cudart.cudaStreamDestroy, self._stream)

    @property
    def handle(self) -> int:
        """The stream's address, as TensorRT takes it."""
        return int(self._stream)

    def wait(self) -> None:
        """Wait until everything that was given to the stream is done."""
        check(cudart.cudaStreamSynchronize(self._stream))

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device."""
        assert array.flags.c_contiguous, "copies are of contiguous arrays"
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Fill a contiguous host array from the device, and wait for it."""
        assert array.flags.c_contiguous, "copies are of contiguous arrays"
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))
        self.wait()

    def copy_blocks(
        self, target: int, source: int, *, pitches: tuple[int, int], width: int, height: int
    ) -> None:
        """Copy `height` blocks of `width` bytes within the device.

        Pitches are bytes from block to block, in the target and in the source.
        """
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(
            cudart.cudaMemcpy2DAsync(
                target, pitches[0], source, pitches[1], width, height, kind, self._stream
            )
        )

    def capture(self, launch: Callable[[], None]) -> CapturedGraph:
        """Record what `launch` gives to this stream, without running it."""
        # Thread-local: what other threads of the process do with CUDA must not spoil the capture.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            launch()
        finally:
            # A capture that is left open would make every later call on the stream fail.
            ended = cudart.cudaStreamEndCapture(self._stream)
        return CapturedGraph(check(ended), self._stream)


class CapturedGraph:
    """Recorded device work that is launched as one."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._stream = stream
        try:
            self._executable = check(cudart.cudaGraphInstantiate(graph, 0))
        finally:
            check(cudart.cudaGraphDestroy(graph))
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Run the recorded work on the stream it was recorded from."""
        check(cudart.cudaGraphLaunch(self._executable, self._stream))


class DeviceMemory:
    """Zeroed device memory; freed with the object."""

    def __init__(self, num_bytes: int, stream: Stream) -> None:
        self.num_bytes = num_bytes
        self.address = int(check(cudart.cudaMalloc(num_bytes)))
        weakref.finalize(self, cudart.cudaFree, self.address)
        check(cudart.cudaMemsetAsync(self.address, 0, num_bytes, stream.handle))


class DeviceTable:
    """Arrays of one shape on the device, each at an address that engines take: a padded table."""

    def __init__(
        self, num_entries: int, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream
    ) -> None:
        self.shape = shape
        self._dtype = dtype
        self._entry_bytes = int(np.prod(shape)) * dtype.itemsize
        self._pitch = -(-self._entry_bytes // _ALIGNMENT) * _ALIGNMENT
        self._num_entries = num_entries
        self._stream = stream
        self._memory = DeviceMemory(num_entries * self._pitch, stream)

    def address(self, index: int) -> int:
        """Return the address of one array."""
        assert 0 <= index < self._num_entries, f"entry {index} of {self._num_entries}"
        return self._memory.address + index * self._pitch

    def binding(self, index: int = 0) -> Binding:
        """Return one array as a context takes it."""
        return Binding(self.address(index), self.shape)

    def write(self, array: NDArray[Any]) -> None:
        """Overwrite the first array; TensorRT converts nothing, so the element type is set here."""
        assert array.shape == self.shape, f"{array.shape} into {self.shape}"
        self._stream.write(self.address(0), np.ascontiguousarray(array, self._dtype))

    def write_all(self, arrays: NDArray[Any]) -> None:
        """Overwrite all arrays, [num_entries, *shape], in one copy."""
        assert arrays.shape == (self._num_entries, *self.shape), f"{arrays.shape}"
        padded = np.zeros((self._num_entries, self._pitch), np.uint8)
        entries = np.ascontiguousarray(arrays, self._dtype).reshape(self._num_entries, -1)
        padded[:, : self._entry_bytes] = entries.view(np.uint8)
        self._stream.write(self._memory.address, padded)

    def read(self) -> NDArray[Any]:
        """Return all arrays, [num_entries, *shape]."""
        padded = np.empty((self._num_entries, self._pitch), np.uint8)
        self._stream.read(self._memory.address, padded)
        entries = np.ascontiguousarray(padded[:, : self._entry_bytes])
        return entries.view(self._dtype).reshape(self._num_entries, *self.shape)
