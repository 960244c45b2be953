"""What every front end asks: loaded systems that answer, wherever their engines run."""

from __future__ import annotations

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from msgspec import structs

from recmas_runtime.core.errors import Problem
from recmas_runtime.scheduling.limits import CHUNK, KEPT_BYTES
from recmas_runtime.serve.protocol import (
    AnyEvent,
    AnyRequest,
    Ask,
    Cancel,
    Done,
    Failed,
    Gauges,
    Load,
    Loaded,
    ModelInfo,
    Piece,
    ProblemInfo,
    Read,
    Reason,
    Step,
    Unload,
    Unloaded,
    WasRead,
)

_FULL: Final = "Ask again later, or start the service with a larger --max-queue."


class ServiceError(Exception):
    """Why a request has no answer; see `protocol.Failed`."""

    def __init__(self, reason: Reason, problems: tuple[ProblemInfo, ...]) -> None:
        super().__init__("; ".join(f"{each.code}: {each.message}" for each in problems))
        self.reason = reason
        self.problems = problems

    @classmethod
    def of(cls, reason: Reason, code: str, message: str, hint: str) -> ServiceError:
        """Return an error with one problem."""
        problem = Problem(code=code, message=message, hint=hint)
        return cls(reason, (ProblemInfo.of(problem),))


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """How much a service takes on.

    Attributes:
        max_batch: Requests that run at a time; None for what each bundle was planned for.
        max_queue: Requests that may wait.
        max_wait_s: How long one may wait before it is refused; None for as long as it takes.
        kept_bytes: Memory for beginnings of prompts that are kept for later requests.
        cache_bytes: Memory for the caches of requests that run, as plans count it; None for as much
            as they need. A single request always runs.
        chunk: Prompt positions that run in one engine call.
    """

    max_batch: int | None = None
    max_queue: int = 64
    max_wait_s: float | None = None
    kept_bytes: int = KEPT_BYTES
    cache_bytes: int | None = None
    chunk: int = CHUNK


class Watch(Protocol):
    """Sees one request pass, in the event loop of the service."""

    def event(self, event: Step | Piece | Done | WasRead) -> None:
        """An event is passed on."""

    def end(self, error: ServiceError | None) -> None:
        """It has ended: after its `Done` or `WasRead`, with an error, or else it was left."""


class Observer(Protocol):
    """Is shown every request for an answer or a reading, also those that are refused."""

    def begin(self, request: Ask | Read) -> Watch:
        """A request has come in."""


@dataclass
class _Open:
    """A request that has not ended."""

    events: asyncio.Queue[AnyEvent | ServiceError] = field(default_factory=asyncio.Queue)


class Service(ABC):
    """Loaded systems that answer; all of it belongs to one event loop.

    Whoever leaves an iterator of `ask` (closes it, or is cancelled within it) cancels the request,
    and its rows are free after the step that runs.

    Attributes:
        models: What is loaded, by name.
        lost: Names of what was loaded and cannot be loaded again for now.
        gauges: What the engines last said about themselves.
        is_ready: Whether requests are taken: engines are loaded and nothing ends.
        observers: Who is shown requests: metrics, traces, logs.
        num_restarts: How often engines were started in place of some that died.
        worker_pid: The process that has the engines, where that is not this one.
    """

    num_restarts: int = 0
    worker_pid: int | None = None

    def __init__(self, limits: ServiceLimits) -> None:
        self.limits = limits
        self.models: dict[str, ModelInfo] = {}
        self.lost: set[str] = set()
        self.gauges: Gauges | None = None
        self.is_ready = False
        self.observers: list[Observer] = []
        self._ids = itertools.count(1)
        self._open: dict[int, _Open] = {}

    @property
    def num_open(self) -> int:
        """Requests that have not ended, those that wait included."""
        return len(self._open)

    @abstractmethod
    def _send(self, request: AnyRequest) -> None:
        """Pass a request on to the engines; never blocks."""

    @abstractmethod
    async def close(self, grace_s: float) -> None:
        """Take no more requests, wait so long for those that run, then stop them."""

    async def ask(
        self, ask: Ask, *, limit_s: float | None = None
    ) -> AsyncGenerator[Step | Piece | Done, None]:
        """Answer; the last event is `Done`. The ask's own `id` does not matter.

        Args:
            limit_s: In which the answer must be whole; None for as long as it takes.

        Raises:
            ServiceError: It has no answer.
        """
        with self._watched(ask) as watches:
            self._demand_room(ask.model)
            now = asyncio.get_running_loop().time()
            whole_at = math.inf if limit_s is None else now + limit_s
            wait = self.limits.max_wait_s
            first_at = math.inf if wait is None else now + wait
            async with _Request(self, ask) as request:
                while True:
                    try:
                        event = await _by(min(first_at, whole_at), request.next())
                    except TimeoutError:
                        if whole_at <= first_at:
                            message = f"there was no answer within {limit_s:g} s"
                            raise _too_late(message, "Ask for fewer tokens.") from None
                        message = f"no room within {wait:g} s"
                        raise ServiceError.of("full", "RM541", message, _FULL) from None
                    first_at = math.inf
                    assert isinstance(event, Step | Piece | Done), event
                    for watch in watches:
                        watch.event(event)
                    yield event
                    if isinstance(event, Done):
                        return

    async def read(self, read: Read, *, limit_s: float | None = None) -> WasRead:
        """Have a text read.

        Args:
            limit_s: In which it must be; None for as long as it takes.

        Raises:
            ServiceError: It cannot be.
        """
        with self._watched(read) as watches:
            self._demand_room(read.model)
            now = asyncio.get_running_loop().time()
            whole_at = math.inf if limit_s is None else now + limit_s
            async with _Request(self, read) as request:
                try:
                    event = await _by(whole_at, request.next())
                except TimeoutError:
                    message = f"the text was not read within {limit_s:g} s"
                    raise _too_late(message, "Send a shorter one.") from None
                assert isinstance(event, WasRead), event
                for watch in watches:
                    watch.event(event)
                return event

    async def load(self, path: str, model: str) -> ModelInfo:
        """Load a bundle under a name that is free.

        Raises:
            ServiceError: It cannot be loaded.
        """
        info = await self._load(path, model)
        self.models[model] = info
        return info

    async def unload(self, model: str) -> None:
        """Let a system go; its requests end first, new ones are refused at once.

        Raises:
            ServiceError: There is none of that name.
        """
        self._demand_model(model)
        del self.models[model]
        await self._unload(model)

    async def _load(self, path: str, model: str) -> ModelInfo:
        async with _Request(self, Load(id=0, path=path, model=model)) as request:
            event = await request.next()
            assert isinstance(event, Loaded), event
            return event.model

    async def _unload(self, model: str) -> None:
        async with _Request(self, Unload(id=0, model=model)) as request:
            event = await request.next()
            assert isinstance(event, Unloaded), event

    def dispatch(self, event: AnyEvent | Gauges) -> None:
        """Take what the engines tell; in the service's event loop."""
        if isinstance(event, Gauges):
            self.gauges = event
        elif (request := self._open.get(event.id)) is not None:  # else it was cancelled
            request.events.put_nowait(event)

    def fail_open(self, error: ServiceError) -> None:
        """End all requests that have not ended."""
        for request in self._open.values():
            request.events.put_nowait(error)

    @contextmanager
    def _watched(self, request: Ask | Read) -> Iterator[list[Watch]]:
        watches = [observer.begin(request) for observer in self.observers]
        failed: ServiceError | None = None
        try:
            yield watches
        except ServiceError as error:
            failed = error
            raise
        finally:
            for watch in watches:
                watch.end(failed)

    def _demand_room(self, model: str) -> None:
        self._demand_model(model)
        if not self.is_ready:
            hint = "Ask again in a few seconds."
            raise ServiceError.of("stopped", "RM542", "the service starts or ends", hint)
        running = self.limits.max_batch or max(m.max_batch for m in self.models.values())
        if self.num_open >= running + self.limits.max_queue:
            message = f"{self.num_open} requests run or wait already"
            raise ServiceError.of("full", "RM541", message, _FULL)

    def _demand_model(self, model: str) -> None:
        if model in self.lost:
            message = f"the bundle of the model {model!r} cannot be loaded now"
            raise ServiceError.of("stopped", "RM542", message, "Ask again in a few seconds.")
        if model not in self.models:
            known = ", ".join(sorted(self.models)) or "none"
            raise ServiceError.of(
                "input", "RM540", f"there is no model {model!r}", f"Loaded are: {known}."
            )


class _Request:
    """A request on its way: opened when it is sent, cancelled if it is left before it ends."""

    def __init__(self, service: Service, request: Ask | Read | Load | Unload) -> None:
        self._service = service
        self._request = structs.replace(request, id=next(service._ids))
        self._ended = False

    async def __aenter__(self) -> _Request:
        self._open = self._service._open[self._request.id] = _Open()
        self._service._send(self._request)
        return self

    async def next(self) -> AnyEvent:
        """Return the next event; raises what ends the request."""
        event = await self._open.events.get()
        self._ended = not isinstance(event, Step | Piece)
        if isinstance(event, ServiceError):
            raise event
        if isinstance(event, Failed):
            raise ServiceError(event.reason, event.problems)
        return event

    async def __aexit__(self, *exception: object) -> None:
        del self._service._open[self._request.id]
        if not self._ended:
            self._service._send(Cancel(id=self._request.id))


async def _by(time: float, event: Awaitable[AnyEvent]) -> AnyEvent:
    """Wait for an event until a time of the event loop."""
    async with asyncio.timeout_at(None if math.isinf(time) else time):
        return await event


def _too_late(message: str, hint: str) -> ServiceError:
    return ServiceError.of("timeout", "RM547", message, hint)


def by_name(models: Mapping[str, ModelInfo]) -> list[ModelInfo]:
    """Return models in the order of their names."""
    return [models[name] for name in sorted(models)]
