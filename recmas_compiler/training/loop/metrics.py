"""Figures of a run as JSON lines: one object per step and per measurement, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from recmas_compiler.training.loop.checkpoint import unwritable

METRICS_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a metrics file.

    Args:
        path: The file; made if it is not there.
        keep_bytes: What is behind this place was written after the checkpoint that a run goes on
            from, and is cut off. A file that lost its end keeps the lines that are whole.

    Raises:
        RecmasError: RM303 if it cannot be written.
    """

    def __init__(self, path: Path, *, keep_bytes: int) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            kept = os.pread(self._file, keep_bytes, 0)
            self._num_bytes = kept.rfind(b"\n") + 1
            os.ftruncate(self._file, self._num_bytes)
            os.lseek(self._file, self._num_bytes, os.SEEK_SET)
        except OSError as error:
            raise unwritable(path, error) from error

    def sync(self) -> int:
        """Bring the file to the disk and return its size, on which a checkpoint counts.

        Raises:
            RecmasError: RM303.
        """
        try:
            os.fsync(self._file)
        except OSError as error:
            raise unwritable(self._path, error) from error
        return self._num_bytes

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object.

        Raises:
            RecmasError: RM303; the file then ends with the line before.
        """
        line = (json.dumps(entry) + "\n").encode()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._num_bytes)
            raise unwritable(self._path, error) from error
        self._num_bytes += len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a metrics file; a last line that was cut off is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory so far in MiB: of the GPU if one is used, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
