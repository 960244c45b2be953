"""A service behind an address: from the first look at its options until its last request."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.serve.http.server import KEEP_ALIVE_S, uvicorn_config
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.log import ServiceLog, cut
from recmas_runtime.serve.operation.asgi import App
from recmas_runtime.serve.service import Service

_BACKLOG: Final = 512
# Files that a front end needs besides its connections.
_OTHER_FILES: Final = 64
_MAX_CONNECTIONS: Final = 4096
# After the engines have stopped, in which streams send their last error.
_LAST_WORDS_S: Final = 2
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def bind(host: str, port: int) -> list[socket.socket]:
    """Take the addresses that a host name stands for; port 0 takes any that is free.

    Nothing is accepted yet, so that who asks before engines are loaded is refused and not kept
    waiting.

    Raises:
        RecmasError: RM545 if they cannot be had.
    """
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_ADDRCONFIG
        )
        for family, kind, protocol, _, address in dict.fromkeys(found):
            bound = socket.socket(family, kind, protocol)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = sockets[0].getsockname()[1] if len(sockets) > 1 else port
            bound.bind((address[0], taken, *address[2:]))
            bound.setblocking(False)
    except (OSError, UnicodeError, OverflowError) as error:
        for each in sockets:
            each.close()
        raise _refused(host, port, error) from None
    return sockets


def _refused(host: str, port: int, error: Exception) -> RecmasError:
    place = f"{host}:{port}"
    match error:
        case socket.gaierror() | UnicodeError():
            return fail("RM545", f"no address is known for the host {host!r}", hint="See --host.")
        case OSError(errno=errno.EADDRINUSE):
            return fail(
                "RM545",
                f"port {port} is in use on {host}",
                hint="End what uses it, or take another one with --port; 0 takes a free one.",
            )
        case OSError(errno=errno.EACCES):
            hint = "Ports below 1024 are for the system's own services: take a higher --port."
            return fail("RM545", f"{place} may not be used", hint=hint)
        case OSError():
            return fail("RM545", f"{place} cannot be used: {reason_of(error)}", hint="See --host.")
    return fail("RM545", f"{port} is no port", hint="See --port.")


class Stop:
    """What signals ask for: the first one to end, the second one to end at once.

    Attributes:
        asked: Is set by the first signal.
        at_once: Is set by the second one.
        by: The first one's name.
    """

    def __init__(self, log: ServiceLog) -> None:
        self._log = log
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.by = ""

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take signals within the block, in the running event loop.

        SIGHUP stays ignored where it is (`nohup`). SIGINT does not: shells without job control
        ignore it for whatever they start with `&`.
        """
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        mine = [
            number
            for number in SIGNALS
            if number == signal.SIGINT or before[number] is not signal.SIG_IGN
        ]
        for number in mine:
            loop.add_signal_handler(number, self.note, signal.Signals(number).name)
        try:
            yield
        finally:
            for number in mine:
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def note(self, name: str) -> None:
        """Take a signal."""
        if not self.asked.is_set():
            self.by = name
            self.asked.set()
        elif not self.at_once.is_set():
            self._log.warning("stopping at once", signal=name)
            self.at_once.set()


async def serve_until(
    stop: Stop,
    app: App,
    settings: HttpSettings,
    service: Service,
    sockets: Sequence[socket.socket],
    log: ServiceLog,
    *,
    grace_s: float,
    when_ready: Callable[[], None],
) -> bool:
    """Answer requests until somebody wants an end, then let those that run end within the grace.

    Until they have, others are refused by the application and not by the system: probes and
    clients are told that this ends.

    Returns:
        Whether nobody wanted it to end at once.

    Raises:
        RecmasError: RM545 if the address was taken meanwhile.
    """
    _hand_over_logs(log)
    server = _Server(_config(app, settings, grace_s))
    for each in sockets:
        try:
            each.listen(_BACKLOG)
        except OSError as error:
            host, port = each.getsockname()[:2]
            raise _refused(host, port, error) from None
    running = asyncio.create_task(server.serve(list(sockets)))
    when_ready()
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if running.done():  # it never ends by itself
        running.result()
    log.info(
        f"{stop.by}: no new requests; those that run may end; a second signal stops at once",
        requests=service.num_open,
        grace_s=grace_s,
    )
    await _close(stop, service, grace_s)
    server.should_exit = True
    try:
        await asyncio.wait_for(running, _LAST_WORDS_S)
    except TimeoutError:
        log.warning("connections cut", connections=len(server.server_state.connections))
        server.cut()
    log.info("stopped")
    return not stop.at_once.is_set()


async def _close(stop: Stop, service: Service, grace_s: float) -> None:
    """Close a service within the grace, or at once if a second signal comes."""
    closing = asyncio.create_task(service.close(grace_s))
    at_once = asyncio.create_task(stop.at_once.wait())
    await asyncio.wait({closing, at_once}, return_when=asyncio.FIRST_COMPLETED)
    at_once.cancel()
    if not closing.done():
        await service.close(0.0)
    await closing


def _config(app: App, settings: HttpSettings, grace_s: float) -> uvicorn.Config:
    config = uvicorn_config(app, settings, grace_s=grace_s)
    config.http = _Connection
    config.lifespan = "off"  # the service is started before the application and ends after it
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_CONNECTIONS + _OTHER_FILES
    if files < wanted and (most == resource.RLIM_INFINITY or files < most):
        files = wanted if most == resource.RLIM_INFINITY else min(most, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    config.limit_concurrency = max(16, min(_MAX_CONNECTIONS, files - _OTHER_FILES))
    return config


class _Server(uvicorn.Server):
    """A server that leaves signals to others."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield

    def cut(self) -> None:
        """Close connections whose clients do not read what they asked for."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _Connection(H11Protocol):
    """A connection that has to send a whole head of a request in time, not only its first byte."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Go on waiting if that was no whole head of a request."""
        before = self.timeout_keep_alive_task
        cycle = self.cycle
        super().data_received(data)
        is_waiting = self.cycle is cycle and (cycle is None or cycle.response_complete)
        if is_waiting and before is not None and not self.transport.is_closing():
            self._wait(before.when())

    def _wait(self, until: float | None = None) -> None:
        until = self.loop.time() + KEEP_ALIVE_S if until is None else until
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_at(until, self.timeout_keep_alive_handler)


class _IntoLog(logging.Handler):
    """Hands what uvicorn and asyncio have to say to the log of a service."""

    def __init__(self, log: ServiceLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record, with the kind of error that it is about."""
        fields: dict[str, Any] = {"source": record.name, "message": cut(record.getMessage())}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = cut(repr(record.exc_info[1]))
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        self._log.warning("server", **fields)


def _hand_over_logs(log: ServiceLog) -> None:
    for name in ("uvicorn", "asyncio", "recmas"):
        logger = logging.getLogger(name)
        logger.handlers = [_IntoLog(log)]
        logger.propagate = False
