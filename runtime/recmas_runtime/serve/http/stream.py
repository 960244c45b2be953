"""Server-sent events as OpenAI's clients read them: comments with one line end, then chunks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any, Final, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from recmas_runtime.serve.http.answers import Events, client_left
from recmas_runtime.serve.http.errors import ERROR_KEY, ApiError, internal_error
from recmas_runtime.serve.http.guard import LOG
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.protocol import Done, Piece, Step

# The part of an OpenAPI page that declares a stream: what each of its events is.
DOCUMENTED: Final = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "An event; its data is a chunk as JSON, or `[DONE]` at the end.",
            "required": ["data"],
            "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        }
    }
}


class Chunks(Protocol):
    """What a form sends: bytes for each event; those that begin with a colon are comments."""

    def begin(self) -> Iterator[bytes]:
        """Return what comes before everything."""

    def step(self, step: Step) -> Iterator[bytes]:
        """Return what a step of the plan adds to its comment."""

    def piece(self, text: str) -> Iterator[bytes]:
        """Return a piece of the answer."""

    def idle(self) -> bytes:
        """Return a chunk that says nothing, for clients that wait for one."""

    def end(self, done: Done) -> Iterator[bytes]:
        """Return the rest."""

    def fail(self, error: ApiError) -> bytes:
        """Return what ends a stream that fails."""


def line(data: object, event: str | None = None) -> bytes:
    """Return an event as the stream has it.

    All but ASCII is escaped: some clients end lines at other line ends of Unicode, too.
    """
    head = "" if event is None else f"event: {event}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode("ascii")


def comment(text: str) -> bytes:
    """Return a comment, which must not end in an empty line: to some clients that is an event."""
    return f": {text}\n".encode("ascii", "replace")


class _Source:
    """Events of an answer, one after the other, with a limit on each wait."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._next: asyncio.Task[Step | Piece | Done] | None = None

    async def wait(self, seconds: float) -> bool:
        """Return whether the next event, or what it fails with, is there in time."""
        if self._next is None:
            self._next = asyncio.create_task(anext(self._events))
        done, _ = await asyncio.wait({self._next}, timeout=seconds)
        return bool(done)

    def look(self) -> None:
        """Raise what the event that was waited for failed with, if it did."""
        if self._next is not None and self._next.done() and self._next.exception() is not None:
            self.take()

    def take(self) -> Step | Piece | Done:
        """Return the event that was waited for, or raise what it failed with."""
        assert self._next is not None, "waited for"
        task, self._next = self._next, None
        return task.result()

    async def close(self) -> None:
        """Cancel the request unless it has ended."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._events.aclose()


class EventStream(Response):
    """A stream of one answer; whoever leaves it cancels its request."""

    def __init__(self, source: _Source, chunks: Chunks, settings: HttpSettings) -> None:
        super().__init__(media_type="text/event-stream")
        # Proxies that gather what they pass on would hold a stream back.
        self.headers["X-Accel-Buffering"] = "no"
        del self.headers["content-length"]
        self._source = source
        self._chunks = chunks
        self._settings = settings
        self._failed: ApiError | None = None

    @classmethod
    async def open(cls, events: Events, chunks: Chunks, settings: HttpSettings) -> EventStream:
        """Return a stream unless the request is refused within the first moment.

        Raises:
            ApiError: It is, and can be answered with a status of its own.
        """
        source = _Source(events)
        try:
            await source.wait(settings.first_event_s)
            source.look()
        except BaseException:
            await source.close()
            raise
        return cls(source, chunks, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends, or its client leaves or takes nothing."""
        pump = asyncio.create_task(self._pump(send))
        left = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for task in (pump, left):
                task.cancel()
            await asyncio.gather(pump, left, return_exceptions=True)
            scope[ERROR_KEY] = self._failed
            await self._source.close()

    async def _pump(self, send: Send) -> None:
        async def put(part: bytes, *, more: bool = True) -> None:
            # A client that takes nothing must not hold the request, nor this task, for ever.
            async with asyncio.timeout(self._settings.stall_timeout_s):
                await send({"type": "http.response.body", "body": part, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._parts()) as parts:
                async for part in parts:
                    await put(part)
            await put(b"", more=False)
        except TimeoutError:
            LOG.warning("a client of a stream took nothing for too long")
            raise

    async def _parts(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._events_as_parts()) as parts:
                async for part in parts:
                    yield part
        except ApiError as error:
            self._failed = error
            yield self._chunks.fail(error)
        except Exception:
            LOG.exception("a stream failed")
            self._failed = internal_error()
            yield self._chunks.fail(self._failed)

    async def _events_as_parts(self) -> AsyncGenerator[bytes, None]:
        clock = _Clock(self._settings.chunk_s)
        for part in self._chunks.begin():
            yield clock.note(part)
        while True:
            if not await self._source.wait(self._settings.comment_s):
                yield comment("waiting")
            else:
                event = self._source.take()
                for part in self._told(event):
                    yield clock.note(part)
                if isinstance(event, Done):
                    return
            if clock.is_late():
                yield clock.note(self._chunks.idle())

    def _told(self, event: Step | Piece | Done) -> Iterator[bytes]:
        match event:
            case Step():
                agents = ", ".join(event.agents)
                yield comment(f"round {event.round}/{event.rounds} {agents}: {event.op}")
                yield from self._chunks.step(event)
            case Piece():
                yield from self._chunks.piece(event.text)
            case Done():
                yield from self._chunks.end(event)


class _Clock:
    """When the last chunk was sent; comments do not count."""

    def __init__(self, limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._now = now
        self._last = now()

    def note(self, part: bytes) -> bytes:
        if not part.startswith(b":"):
            self._last = self._now()
        return part

    def is_late(self) -> bool:
        return self._now() - self._last >= self._limit_s


def told_step(step: Step) -> dict[str, Any]:
    """Return a step as chunks and answers have it."""
    return {
        "op": step.op,
        "round": step.round,
        "rounds": step.rounds,
        "agents": list(step.agents),
    }
