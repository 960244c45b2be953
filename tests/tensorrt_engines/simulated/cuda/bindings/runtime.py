"""A stand-in for CUDA's bindings on a machine without a GPU: device memory is host memory.

It keeps CUDA's rules where the code could break them: memory comes unaligned by nothing less than
256 bytes and full of junk, freed memory is forgotten, copies must lie inside an allocation, and
what is given to a stream that is being captured is recorded and not run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

cudaStreamNonBlocking = 1
ALIGNMENT = 256
JUNK = 0x7B


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorStreamCaptureUnsupported = 900


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


OK = cudaError_t.cudaSuccess
WRONG = cudaError_t.cudaErrorInvalidValue

allocations: dict[int, np.ndarray[Any, Any]] = {}


class Stream:
    def __init__(self) -> None:
        self.recording: list[Callable[[], None]] | None = None

    def __int__(self) -> int:
        return id(self)


streams: dict[int, Stream] = {}


def on_stream(stream: Any, work: Callable[[], None]) -> None:
    found = streams[int(stream)]
    if found.recording is None:
        work()
    else:
        found.recording.append(work)


def is_capturing(stream: Any) -> bool:
    return streams[int(stream)].recording is not None


def owns(address: int, size: int) -> bool:
    return any(
        start <= address and address + size <= start + len(block) - ALIGNMENT
        for start, block in allocations.items()
    )


def cudaGetDeviceCount() -> tuple[Any, ...]:
    return OK, 1


def cudaDeviceGetAttribute(attr: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
    return OK, 9 if attr is cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor else 0


def cudaGetErrorString(error: cudaError_t) -> tuple[Any, ...]:
    return OK, error.name.encode()


def cudaMalloc(size: int) -> tuple[Any, ...]:
    block = np.full(size + ALIGNMENT, JUNK, np.uint8)
    address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
    allocations[address] = block
    return OK, address


def cudaFree(devPtr: int) -> tuple[Any, ...]:
    return (OK,) if allocations.pop(devPtr, None) is not None else (WRONG,)


def cudaMemsetAsync(devPtr: int, value: int, count: int, stream: Any) -> tuple[Any, ...]:
    if not owns(devPtr, count):
        return (WRONG,)
    on_stream(stream, lambda: ctypes.memset(devPtr, value, count) and None)
    return (OK,)


def cudaMemcpyAsync(
    dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any
) -> tuple[Any, ...]:
    return cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)


def cudaMemcpy2DAsync(
    dst: int,
    dpitch: int,
    src: int,
    spitch: int,
    width: int,
    height: int,
    kind: cudaMemcpyKind,
    stream: Any,
) -> tuple[Any, ...]:
    if kind is not cudaMemcpyKind.cudaMemcpyDeviceToDevice and is_capturing(stream):
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)  # pageable memory
    to_device = kind is not cudaMemcpyKind.cudaMemcpyDeviceToHost
    from_device = kind is not cudaMemcpyKind.cudaMemcpyHostToDevice
    if to_device and not owns(dst, (height - 1) * dpitch + width):
        return (WRONG,)
    if from_device and not owns(src, (height - 1) * spitch + width):
        return (WRONG,)
    if width > min(dpitch, spitch):
        return (WRONG,)

    def copy() -> None:
        for row in range(height):
            ctypes.memmove(dst + row * dpitch, src + row * spitch, width)

    on_stream(stream, copy)
    return (OK,)


def cudaStreamCreateWithFlags(flags: int) -> tuple[Any, ...]:
    stream = Stream()
    streams[int(stream)] = stream
    return OK, stream


def cudaStreamDestroy(stream: Any) -> tuple[Any, ...]:
    streams.pop(int(stream))
    return (OK,)


def cudaStreamSynchronize(stream: Any) -> tuple[Any, ...]:
    if is_capturing(stream):
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
    return (OK,)


def cudaStreamBeginCapture(stream: Any, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
    streams[int(stream)].recording = []
    return (OK,)


def cudaStreamEndCapture(stream: Any) -> tuple[Any, ...]:
    found = streams[int(stream)]
    recorded, found.recording = found.recording, None
    return OK, recorded


def cudaGraphInstantiate(graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
    return OK, list(graph)


def cudaGraphDestroy(graph: list[Callable[[], None]]) -> tuple[Any, ...]:
    graph.clear()
    return (OK,)


def cudaGraphLaunch(graphExec: list[Callable[[], None]], stream: Any) -> tuple[Any, ...]:
    for work in graphExec:
        work()
    return (OK,)


def cudaGraphExecDestroy(graphExec: list[Callable[[], None]]) -> tuple[Any, ...]:
    graphExec.clear()
    return (OK,)
