"""How long a latent step must take at least: the time of reading its weights once."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

# They look single rows of their table up and never read all of it.
_LOOKUPS: Final = frozenset({"Gather", "GatherBlockQuantized"})


def weight_bytes(graph: Path) -> int:
    """Return the bytes of the weights that one run of a graph reads, each once.

    Counted are initializers as they are stored, so that scales and packed integers count as what
    they are; tables that are only looked up do not count.
    """
    model = onnx.load(str(graph), load_external_data=False)
    read = {name for n in model.graph.node if n.op_type not in _LOOKUPS for name in n.input}
    # Two names for one place in the file are one weight.
    places: dict[object, int] = {}
    for tensor in model.graph.initializer:
        if tensor.name in read:
            outside = {entry.key: entry.value for entry in tensor.external_data}
            place = (outside["location"], outside.get("offset", "0")) if outside else tensor.name
            places[place] = _num_bytes(tensor)
    return sum(places.values())


def weight_precision(graph: Path) -> str:
    """Return how a graph holds its weights: `int4`, `int8`, or the element type of the largest."""
    model = onnx.load(str(graph), load_external_data=False)
    bits = [
        attribute.i
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "bits" and node.op_type not in _LOOKUPS
    ]
    if bits:
        return f"int{min(bits)}"
    largest = max(model.graph.initializer, key=_num_bytes)
    return str(onnx.helper.tensor_dtype_to_np_dtype(largest.data_type))


class Reader(Protocol):
    """Reads a block of memory as large as the weights of a step."""

    def seconds(self) -> float:
        """Return the time of reading the block once."""


class HostReader:
    """Reads a block of memory, with as many threads as an engine has.

    Args:
        num_bytes: Of the block; the weights of a step.
        threads: Each reads its part.
    """

    def __init__(self, num_bytes: int, *, threads: int) -> None:
        self._parts = np.array_split(np.ones(num_bytes // 8, np.uint64), threads)

    def seconds(self) -> float:
        """Return the time of reading the block once."""
        start = time.perf_counter()
        workers = [threading.Thread(target=_read, args=(part,)) for part in self._parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start


def _read(part: NDArray[np.uint64]) -> None:
    # The reduction that computes least: those of floats are slower than the memory of one core.
    np.bitwise_or.reduce(part)


class DeviceReader:
    """Reads a block of the memory of the current CUDA device (untried on hardware).

    Args:
        num_bytes: Of the block.
    """

    def __init__(self, num_bytes: int) -> None:
        import torch

        self._block = torch.ones(num_bytes // 4, device="cuda")
        self._synchronize = torch.cuda.synchronize

    def seconds(self) -> float:
        """Return the time of reading the block once."""
        self._synchronize()
        start = time.perf_counter()
        self._block.sum()
        self._synchronize()
        return time.perf_counter() - start


def _num_bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    element = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return len(tensor.raw_data) or math.prod(tensor.dims) * element.itemsize
