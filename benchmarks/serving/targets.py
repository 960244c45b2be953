"""Who is asked: a server over HTTP, or a service in this process; and what a client sees of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
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
    """Something that answers."""

    async def ask(self, question: str, max_tokens: int) -> Seen:
        """Ask one question greedily and read the answer as it comes."""


@dataclass(frozen=True, kw_only=True)
class LocalTarget:
    """A service in this process, without HTTP; its engines run in a thread."""

    service: Service
    model: str
    field: str = "question"

    async def ask(self, question: str, max_tokens: int) -> Seen:
        """Ask one question greedily and read the answer as it comes."""
        sampling = {"max_new_tokens": max_tokens, "temperature": 0.0}
        ask = Ask(id=0, model=self.model, record={self.field: question}, sampling=sampling)
        start = time.perf_counter()
        first, done = None, None
        async for event in self.service.ask(ask):
            if isinstance(event, Piece) and first is None:
                first = time.perf_counter() - start
            if isinstance(event, Done):
                done = event
        total = time.perf_counter() - start
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
    """A server that speaks OpenAI's chat form."""

    client: httpx.AsyncClient
    model: str

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
        start = time.perf_counter()
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
                        first = time.perf_counter() - start
                    text += piece
                    finish = choice.get("finish_reason") or finish
        total = time.perf_counter() - start
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
async def over_http(url: str, model: str | None, key: str | None) -> AsyncIterator[HttpTarget]:
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
        yield HttpTarget(client=client, model=str(model))


@asynccontextmanager
async def in_process(
    bundle: Path, limits: ServiceLimits, threads: int | None
) -> AsyncIterator[LocalTarget]:
    """Ask a service in this process."""
    service = await LocalService.start({"bundle": str(bundle)}, limits, threads=threads)
    try:
        yield LocalTarget(service=service, model="bundle", field=service.models["bundle"].fields[0])
    finally:
        await service.close(0.0)


@asynccontextmanager
async def started(
    bundle: Path, threads: int | None, options: list[str]
) -> AsyncIterator[HttpTarget]:
    """Start `recmas serve` on a free port of this machine, ask it, and end it."""
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
            async with over_http(f"http://127.0.0.1:{port}/v1", None, None) as target:
                yield target
        finally:
            process.terminate()


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
