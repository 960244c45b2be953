"""A service whose engines run in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from recmas_runtime.serve.engine_host import EngineHost
from recmas_runtime.serve.protocol import AnyEvent, AnyRequest, Gauges
from recmas_runtime.serve.service import Service, ServiceError, ServiceLimits


class LocalService(Service):
    """Engines in a thread: for tests, for a replica of a cluster, for a tool of one user.

    What computes gives up Python's lock within the engines, so that the event loop goes on.
    """

    def __init__(
        self,
        limits: ServiceLimits,
        *,
        device: str = "auto",
        threads: int | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__(limits)
        self._loop = asyncio.get_running_loop()
        self._host = EngineHost(self._tell, limits, device=device, threads=threads, cache=cache)
        self._thread = threading.Thread(target=self._host.run, name="engines", daemon=True)

    @classmethod
    async def start(
        cls,
        bundles: Mapping[str, str],
        limits: ServiceLimits | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        cache: bool = True,
    ) -> Self:
        """Load bundles, by name, and return a service that is ready.

        Raises:
            ServiceError: One cannot be loaded.
        """
        service = cls(limits or ServiceLimits(), device=device, threads=threads, cache=cache)
        service._thread.start()
        try:
            for model, path in bundles.items():
                await service.load(path, model)
        except BaseException:
            await service.close(0.0)
            raise
        service.is_ready = True
        return service

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the engines runs; without it nothing is answered any more."""
        return self._thread.is_alive()

    def _send(self, request: AnyRequest) -> None:
        self._host.submit(request)

    def _tell(self, event: AnyEvent | Gauges) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self._loop.call_soon_threadsafe(self.dispatch, event)

    async def close(self, grace_s: float) -> None:
        """Take no more requests, wait so long for those that run, then stop them."""
        self.is_ready = False
        deadline = self._loop.time() + grace_s
        while self.num_open and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        hint = "Ask again in a few seconds."
        self.fail_open(ServiceError.of("stopped", "RM542", "the service ends", hint))
        self._host.stop()
        await asyncio.to_thread(self._thread.join)
