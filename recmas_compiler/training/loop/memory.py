"""Memory that runs out in a training: where, and what to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from recmas_compiler.training.loop.checkpoint_head import latest_checkpoint
from recmas_runtime.core.errors import fail, is_out_of_memory


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
        if not is_out_of_memory(error):
            raise
        latest = None if checkpoints is None else latest_checkpoint(checkpoints)
        kept = "" if latest is None else f"; the last good checkpoint is {latest}"
        raise fail(
            "RM702",
            f"memory ran out {where()}{kept}",
            hint="Raise `train.accumulation` or lower the stage's `batch_size`; then "
            "`train.max_length`, or `checkpoint_calls: true`.",
        ) from error
