"""Memory that runs out: which errors say so, and what to lower then."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from recmas_compiler.training.loop.checkpoint_head import latest_checkpoint
from recmas_runtime.core.errors import fail

# How torch, oneDNN, C++ and the system word that memory is used up: torch has an exception of its
# own for GPUs only.
_NO_MEMORY: Final = (
    "allocate memory",  # can't, cannot, could not
    "not enough memory",
    "out of memory",
    "outofmemory",
    "bad_alloc",
    "bad allocation",
    "defaultcpuallocator",
    "could not create a primitive",
    "could not create a memory",
    "unable to mmap",
    "unable to allocate",  # numpy
    "failed to allocate",
    "alloc failed",
)


def is_memory_error(error: BaseException) -> bool:
    """Tell whether an error means that memory is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in said for words in _NO_MEMORY)


@contextmanager
def memory_named(where: Callable[[], str], checkpoints: Path | None = None) -> Iterator[None]:
    """Say where memory was used up, and which setting to lower.

    Args:
        where: Asked when it happens.
        checkpoints: The folder of the checkpoints that are kept, to name the last one.

    Raises:
        RecmasError: RM702.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:  # torch's own errors are RuntimeErrors
        if not is_memory_error(error):
            raise
        latest = None if checkpoints is None else latest_checkpoint(checkpoints)
        kept = "" if latest is None else f"; the last good checkpoint is {latest}"
        raise fail(
            "RM702",
            f"memory ran out {where()}{kept}",
            hint="Raise `train.accumulation` or lower the stage's `batch_size`; then "
            "`train.max_length`, or `checkpoint_calls: true`.",
        ) from error
