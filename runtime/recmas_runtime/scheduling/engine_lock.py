"""Who computes on the engines that systems share: one at a time, and no run within another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from recmas_runtime.core.errors import fail
from recmas_runtime.scheduling.scheduler import Scheduler, current_task

Result = TypeVar("Result")


@dataclass
class _Turn:
    """A run's turn on the engines."""

    has_lock: bool = True


# The turns that the running code is a part of, by the lock's `id`. The tools of a run are: a
# function that is called in a thread of its own gets the run's context.
_TURNS: Final[ContextVar[Mapping[int, _Turn]]] = ContextVar("turns", default=MappingProxyType({}))


class EngineLock:
    """Lets one run at a time compute; every run has caches of its own, so they may take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Compute within the block, once all others have paused or ended.

        Raises:
            RecmasError: RM513 within a run on the same engines, for instance from a tool of it.
        """
        turns = _TURNS.get()
        if id(self) in turns:
            raise fail(
                "RM513",
                "this system is answering, and one of its own tools or callbacks asks it again",
                hint="Load the bundle once more for what its tools ask.",
            )
        self._lock.acquire()
        turn = _Turn()
        token = _TURNS.set({**turns, id(self): turn})
        try:
            yield
        finally:
            _TURNS.reset(token)
            # Not held if somebody interrupted the program while it waited to go on.
            if turn.has_lock:
                self._lock.release()

    def run_outside(self, function: Callable[[], Result]) -> Result:
        """Run what computes elsewhere, such as a tool; others use the engines meanwhile."""
        with self.given_up():
            return function()

    def wait(self, future: Future[Result]) -> Result:
        """Wait for what computes elsewhere, such as a remote model; others use the engines."""
        task = current_task()
        with self.given_up():
            if task is not None:  # on engines that runs do not share: others have their turn
                result: Result = task.scheduler.wait_outside(future)
                return result
            try:
                return future.result()
            finally:
                future.cancel()  # nobody waits for it any more, where this was interrupted

    @contextmanager
    def given_up(self) -> Iterator[None]:
        """Let others compute within the block, which is inside of `held`; then wait to go on."""
        turn = _TURNS.get()[id(self)]
        turn.has_lock = False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            turn.has_lock = True


class TaskLock(EngineLock):
    """The lock as runs have it whose calls a scheduler makes, in the thread that holds `lock`.

    They need not wait for each other; that none runs within another holds for them too.
    """

    def __init__(self, lock: EngineLock, scheduler: Scheduler) -> None:
        super().__init__()
        self._of = lock
        self._scheduler = scheduler

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note within the block that the engines' run is this one."""
        token = _TURNS.set({**_TURNS.get(), id(self._of): _Turn()})
        try:
            yield
        finally:
            _TURNS.reset(token)

    def run_outside(self, function: Callable[[], Result]) -> Result:
        """Run what computes elsewhere in a thread; other runs go on meanwhile."""
        result: Result = self._scheduler.in_thread(function)
        return result

    def wait(self, future: Future[Result]) -> Result:
        """Wait for what computes elsewhere; other runs go on meanwhile."""
        result: Result = self._scheduler.wait_outside(future)
        return result
