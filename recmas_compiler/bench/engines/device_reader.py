"""Reading a block of a GPU's memory, to know how fast that can be."""

from __future__ import annotations

import time

import torch


class DeviceReader:
    """Reads a block of the memory of the current CUDA device (untried on hardware).

    Args:
        num_bytes: Of the block.
    """

    def __init__(self, num_bytes: int) -> None:
        self._block = torch.ones(num_bytes // 4, device="cuda")

    def seconds(self) -> float:
        """Return the time of reading the block once."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._block.sum()
        torch.cuda.synchronize()
        return time.perf_counter() - start
