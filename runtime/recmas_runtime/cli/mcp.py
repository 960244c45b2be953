"""`recmas mcp`: a bundle as a tool of coding agents and chat programs."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TextIO

from mcp.server import Server

from recmas_runtime.core.addresses import is_loopback
from recmas_runtime.core.errors import Exit, Problem, RecmasError, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.printing import note
from recmas_runtime.serve import mcp
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.service import ServiceError, ServiceLimits

_MODEL: Final = "system"


def run_mcp(options: argparse.Namespace) -> None:
    """Serve the bundle as the command line says, until the client or a signal ends it.

    Raises:
        RecmasError: RM506 and RM545 for options that it refuses, and what keeps the bundle from
            being loaded.
    """
    if options.json and options.http is None:
        hint = "Leave --json out, or serve over --http."
        raise fail(
            "RM506", "--json has no place: the protocol speaks on standard output", hint=hint
        )
    if options.http is not None:
        asyncio.run(_serve_http(options, _listen(options.http)))
        return
    with mcp.protocol_output() as output:
        asyncio.run(_serve_stdio(options, output))


async def _serve_stdio(options: argparse.Namespace, output: TextIO) -> None:
    async with _server(options) as server:
        await _until_interrupted(mcp.serve_stdio(server, output))


async def _serve_http(options: argparse.Namespace, listener: socket.socket) -> None:
    async with _server(options) as server:
        host, port = listener.getsockname()[:2]
        if not options.quiet:
            shown = f"[{host}]" if ":" in host else host
            note(f"serving {server.name} at http://{shown}:{port}{mcp.PATH}")
        await mcp.serve_http(server, listener)


@asynccontextmanager
async def _server(options: argparse.Namespace) -> AsyncIterator[Server[Any]]:
    """Return a server over the bundle, loaded until the block is left."""
    try:
        service = await LocalService.start(
            {_MODEL: str(options.bundle)},
            ServiceLimits(max_queue=options.max_queue),
            device=options.device,
            threads=options.threads,
            cache=options.cache,
        )
    except ServiceError as error:
        problems = [
            Problem(code=each.code, message=each.message, hint=each.hint) for each in error.problems
        ]
        raise RecmasError(problems) from error
    try:
        yield mcp.make_server(service, _MODEL, description=options.description)
    finally:
        await service.close(0.0)


async def _until_interrupted(serving: Coroutine[Any, Any, None]) -> None:
    """Await what reads standard input; an interrupt ends the process there and then.

    A thread of the package waits in a read that nothing ends but the client, and Python would wait
    for that thread. What was answered is written by then, and engines leave nothing behind.
    """
    interrupt = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt.set)
    task, interrupted = asyncio.create_task(serving), asyncio.create_task(interrupt.wait())
    await asyncio.wait([task, interrupted], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        os._exit(Exit.INTERRUPTED)
    interrupted.cancel()
    await task


def _listen(place: str) -> socket.socket:
    """Return a socket at `[HOST:]PORT`, on this machine only: whoever reaches it is answered."""
    host, colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if not port.isdecimal() or int(port) > 65535 or not is_loopback(host):
        raise fail(
            "RM545",
            f"--http {place!r} is no address that this serves at",
            hint="Give a port, or 127.0.0.1:PORT: the protocol has no key here, so other machines "
            "are not answered. For those put a proxy with a key in front.",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        hint = "Name another port; 0 takes one that is free."
        raise fail("RM545", f"--http {place!r}: {reason_of(error)}", hint=hint) from error
