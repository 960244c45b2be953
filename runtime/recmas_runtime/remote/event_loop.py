"""An event loop beside the runs: calls are on their way there, and runs wait for them or go on."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Close = Callable[[], Coroutine[Any, Any, None]]


class BackgroundLoop:
    """A loop in a thread of its own, from the first call on; it ends with this object.

    The thread never keeps a program alive: an interrupt ends that at once, whatever is on its way.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._closing: list[Close] = []

    def at_end(self, close: Close) -> None:
        """Close something in the loop when that ends."""
        self._closing.append(close)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin work; cancelling the future ends it where it is."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=_run, args=(self._loop,), name="remote models", daemon=True
                )
                thread.start()
                weakref.finalize(self, _end, self._loop, self._closing)
            return self._loop


def _end(loop: asyncio.AbstractEventLoop, closing: Sequence[Close]) -> None:
    async def close() -> None:
        await asyncio.gather(*(each() for each in closing), return_exceptions=True)
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
