"""Many records on shared engines: each runs by itself, and what they compute together is shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.interface import OutOfMemoryError
from recmas_runtime.running.batch import without_memory
from recmas_runtime.running.records import Answer
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.scheduling.scheduler import Scheduler, Task

# How long an interrupt may have to wait for tools.
_WAIT_S: Final = 0.1

Run = Callable[[], Answer]


def run_many(
    runs: Iterable[Run | RecmasError],
    scheduler: Scheduler,
    *,
    lock: EngineLock,
    at_once: int,
    free_memory: Callable[[], None],
) -> Iterator[Answer | RecmasError]:
    """Run what answers records, so many at once; yields in their order what came of each.

    The next one begins as soon as one has ended. Where memory runs out, half as many run at once
    from then on, and those that failed run again.

    Args:
        runs: Are taken one by one, as there is room; in place of some an error that they have had.
        lock: Of the engines.
    """
    left = enumerate(runs)
    again: deque[tuple[int, Run]] = deque()
    running: dict[Task, tuple[int, Run]] = {}
    found: dict[int, Answer | RecmasError] = {}
    place = 0
    is_last = False
    try:
        while True:
            while len(running) < at_once and (again or not is_last):
                if again:
                    index, run = again.popleft()
                else:
                    following = next(left, None)
                    if following is None:
                        is_last = True
                        break
                    index, given = following
                    if isinstance(given, RecmasError):
                        found[index] = given
                        continue
                    run = given
                running[scheduler.start(run)] = index, run
            if running:
                with lock.held():
                    scheduler.run_once(_WAIT_S)
            for task in [task for task in running if task.ended]:
                index, run = running.pop(task)
                error = task.failure
                if error is None:
                    found[index] = task.result
                elif isinstance(error, MemoryError | OutOfMemoryError):
                    free_memory()
                    if running:  # it had less room than there is
                        at_once = max(1, len(running))
                        again.append((index, run))
                    else:
                        found[index] = without_memory(error)
                elif isinstance(error, RecmasError):
                    found[index] = error
                else:
                    raise error
            while place in found:
                yield found.pop(place)
                place += 1
            if not running and is_last and not again:
                return
    finally:
        scheduler.close(list(running))
