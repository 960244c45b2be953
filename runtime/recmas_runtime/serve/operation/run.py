"""A whole service: engines, the HTTP application over them, and what watches both."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from recmas_runtime.core.errors import missing_package
from recmas_runtime.serve.http.app import make_app
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.metrics import Metrics
from recmas_runtime.serve.operation.admin import admin_router
from recmas_runtime.serve.operation.asgi import App
from recmas_runtime.serve.operation.catalog import Catalog, WatchedFolder
from recmas_runtime.serve.operation.memory import available_memory_bytes
from recmas_runtime.serve.operation.request_log import AccessLog, AnswerLog
from recmas_runtime.serve.operation.server import Stop, serve_until
from recmas_runtime.serve.page.routes import page_routes
from recmas_runtime.serve.process import WorkerService
from recmas_runtime.serve.service import ServiceLimits

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

T = TypeVar("T")
_LAST_SPANS_S: Final = 3.0


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `recmas serve` is to do.

    Attributes:
        bundles: Paths by the names that requests call them by.
        watch: A folder whose folders are models too.
        grace_s: That requests get which run when a signal comes.
        log_texts: Whether questions and answers go into the log.
        otlp: Where spans go; None for nowhere.
        cache: Whether packed weights are kept in the user's cache.
    """

    bundles: Mapping[str, str]
    watch: Path | None
    http: HttpSettings
    limits: ServiceLimits
    device: str
    threads: int | None
    grace_s: float
    log: ServiceLog
    log_texts: bool
    otlp: str | None
    cache: bool = True


async def run(
    settings: ServeSettings,
    sockets: Sequence[socket.socket],
    when_ready: Callable[[str, Sequence[str]], None],
) -> bool:
    """Serve on bound sockets until a signal; return whether nobody wanted it to end at once.

    Args:
        when_ready: Gets the address and the models once requests are taken.

    Raises:
        ServiceError: A bundle cannot be loaded.
        RecmasError: RM201 without the extra `otel`, RM545 for addresses that are refused.
    """
    log = settings.log
    provider = _provider(settings.otlp)
    stop = Stop(log)
    with stop.on_signals():
        service = await _unless_stopped(stop, _start(settings))
        if service is None:
            log.info(f"{stop.by}: stopped before it was ready")
            return True
        catalog = Catalog(service, available_memory_bytes)
        watching: asyncio.Task[None] | None = None
        try:
            app = _app(settings, service, catalog, provider)
            if settings.watch is not None:
                folder = WatchedFolder(settings.watch, catalog, service, log)
                await _unless_stopped(stop, folder.look(at_once=True))
                watching = asyncio.create_task(folder.run())
            return await serve_until(
                stop,
                app,
                settings.http,
                service,
                sockets,
                log,
                grace_s=settings.grace_s,
                when_ready=lambda: when_ready(_url(sockets[0]), sorted(service.models)),
            )
        finally:
            if watching is not None:
                watching.cancel()
            await service.close(0.0)
            if provider is not None:
                await _send_last_spans(provider)


async def _start(settings: ServeSettings) -> WorkerService:
    return await WorkerService.start(
        settings.bundles,
        settings.limits,
        log=settings.log,
        device=settings.device,
        threads=settings.threads,
        cache=settings.cache,
    )


def _app(
    settings: ServeSettings,
    service: WorkerService,
    catalog: Catalog,
    provider: TracerProvider | None,
) -> App:
    metrics = Metrics(service)
    service.observers.append(AnswerLog(settings.log, with_texts=settings.log_texts))
    admin = admin_router(catalog, service, has_key=bool(settings.http.api_keys))
    app: App = make_app(
        service, settings.http, metrics=metrics, page=page_routes(), routes=admin.routes
    )
    app = AccessLog(app, settings.log)
    if provider is not None:
        from recmas_runtime.serve.operation.spans import Spans, TraceParent

        service.observers.append(Spans(provider))
        app = TraceParent(app)
    return app


async def _unless_stopped(stop: Stop, starting: Coroutine[Any, Any, T]) -> T | None:
    """Wait for what starts; None, with that cancelled, if a signal comes first."""
    task, asked = asyncio.create_task(starting), asyncio.create_task(stop.asked.wait())
    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return None


def _provider(otlp: str | None) -> TracerProvider | None:
    if otlp is None:
        return None
    try:
        from recmas_runtime.serve.operation.spans import otlp_provider
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="otel") from error
    return otlp_provider(otlp)


async def _send_last_spans(provider: TracerProvider) -> None:
    """Send what is left, unless the collector takes its time."""
    sending = threading.Thread(target=provider.shutdown, daemon=True)
    sending.start()
    await asyncio.to_thread(sending.join, _LAST_SPANS_S)


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
