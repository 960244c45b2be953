"""Who is asked: a server over HTTP, or a service in this process; and what a client sees of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import Ask, Done, Piece
from recmas_runtime.serve.service import Service, ServiceLimits

# More than any answer here takes; a server that hangs shall not hang the run.
TIMEOUT_S = 600.0
START_S = 120.0

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One answer as its client saw it; times count from the moment it asked.

    Attributes:
        first_s: Until the first text was there.
        cached_tokens: Of its prompt, those that were taken from other requests.
    """

    text: str
    first_s: float
    total_s: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str

    @property
    def token_s(self) -> float:
        """Time of each token behind the first."""
        return (self.total_s - self.first_s) / max(1, self.tokens - 1)


class Target(Protocol):
    """Something that answers.

    Attributes:
        clock: What times are taken with, in seconds.
    """

    @property
    def clock(self) -> Clock: ...

    async def ask(self, question: str, max_tokens: int) -> Seen:
        """Ask one question greedily and read the answer as it comes."""


@dataclass(frozen=True, kw_only=True)
class LocalTarget:
    """A service in this process, without HTTP; its engines run in a thread.

    Attributes:
        clock: What times are taken with, in seconds.
    """

    service: Service
    model: str
    field: str
    clock: Clock

    async def ask(self, question: str, max_tokens: int) -> Seen:
        """Ask one question greedily and read the answer as it comes."""
        sampling = {"max_new_tokens": max_tokens, "temperature": 0.0}
        ask = Ask(id=0, model=self.model, record={self.field: question}, sampling=sampling)
        start = self.clock()
        first, done = None, None
        async for event in self.service.ask(ask):
            if isinstance(event, Piece) and first is None:
                first = self.clock() - start
            if isinstance(event, Done):
                done = event
        total = self.clock() - start
        assert done is not None, "events end with `Done`"
        usage = done.answer["usage"]
        return Seen(
            text=done.answer["answer"],
            first_s=total if first is None else first,
            total_s=total,
            tokens=usage["completion_tokens"],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=done.cached_tokens,
            finish_reason=done.answer["finish_reason"],
        )


@dataclass(frozen=True, kw_only=True)
class HttpTarget:
    """A server that speaks OpenAI's chat form.

    Attributes:
        clock: What times are taken with, in seconds.
    """

    client: httpx.AsyncClient
    model: str
    clock: Clock = time.perf_counter

    async def ask(self, question: str, max_tokens: int) -> Seen:
        """Ask one question greedily and read the answer as it comes."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = self.clock()
        first, text, finish, usage = None, "", "", {}
        async with self.client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                sys.exit(f"status {response.status_code}: {response.text}")
            async for chunk in _chunks(response):
                if "error" in chunk:
                    sys.exit(f"the stream ended with an error: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and first is None:
                        first = self.clock() - start
                    text += piece
                    finish = choice.get("finish_reason") or finish
        total = self.clock() - start
        details = usage.get("prompt_tokens_details") or {}
        return Seen(
            text=text,
            first_s=total if first is None else first,
            total_s=total,
            tokens=usage["completion_tokens"],
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
            finish_reason=finish,
        )


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@asynccontextmanager
async def over_http(
    url: str, model: str | None, key: str | None, *, clock: Clock = time.perf_counter
) -> AsyncIterator[HttpTarget]:
    """Ask a server that runs; its first model unless one is named."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # One connection a client, and no limit of the pool between clients and server.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(
        base_url=f"{url.rstrip('/')}/", headers=headers, timeout=TIMEOUT_S, limits=limits
    ) as client:
        if model is None:
            found = await client.get("models")
            found.raise_for_status()
            model = found.json()["data"][0]["id"]
        yield HttpTarget(client=client, model=str(model), clock=clock)


@asynccontextmanager
async def in_process(
    bundle: Path,
    limits: ServiceLimits,
    threads: int | None,
    *,
    clock: Clock = time.perf_counter,
) -> AsyncIterator[LocalTarget]:
    """Ask a service in this process."""
    service = await LocalService.start({"bundle": str(bundle)}, limits, threads=threads)
    try:
        field = service.models["bundle"].fields[0]
        yield LocalTarget(service=service, model="bundle", field=field, clock=clock)
    finally:
        await service.close(0.0)


@asynccontextmanager
async def started(
    bundle: Path, threads: int | None, options: list[str], *, by_processor: bool = False
) -> AsyncIterator[HttpTarget]:
    """Start `recmas serve` on a free port of this machine, ask it, and end it.

    Args:
        by_processor: Take times in processor seconds of the server's processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "recmas_runtime.cli.main", "serve", str(bundle)),
        *("--port", str(port), *options),
        *(() if threads is None else ("--threads", str(threads))),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) as process:
        try:
            await _until_ready(f"http://127.0.0.1:{port}/ready", process)
            url = f"http://127.0.0.1:{port}/v1"
            clock = processor_clock(process.pid) if by_processor else time.perf_counter
            async with over_http(url, None, None, clock=clock) as target:
                yield target
        finally:
            process.terminate()


def processor_clock(pid: int) -> Clock:
    """Return a clock of the processor seconds of a process and of those that it started."""
    pids = descendants(pid)
    return lambda: sum(map(processor_s, pids))


def processor_s(pid: int) -> float:
    """Return the processor seconds that the threads of a process took which run."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text(encoding="ascii").split()[0]) for each in threads) / 1e9


def descendants(pid: int) -> list[int]:
    """Return a process and those that it started, and so on."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for each in children for child in each.read_text().split()]
    return [pid, *(other for child in found for other in descendants(child))]


async def _until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    async with httpx.AsyncClient() as client:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                sys.exit(f"the server ended with status {process.returncode}")
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    sys.exit(f"the server was not ready after {START_S:g} s")
