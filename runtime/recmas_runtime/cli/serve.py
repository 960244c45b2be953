"""`recmas serve`: bundles behind OpenAI's HTTP forms, until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from recmas_runtime.cli.serve_options import KEY_VARIABLE
from recmas_runtime.core.errors import Problem, RecmasError, fail, missing_package
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.printing import note, write_out
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.service import ServiceError, ServiceLimits

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from recmas_runtime.serve.http.settings import HttpSettings
    from recmas_runtime.serve.operation.asgi import App
    from recmas_runtime.serve.operation.server import Stop

T = TypeVar("T")

_MAX_KEY_BYTES: Final = 64 * 2**10
_HELP: Final = "See `recmas serve --help`."


def serve(
    options: argparse.Namespace, data: dict[str, Any], problems: list[Problem], *, as_json: bool
) -> bool:
    """Serve until a signal; return whether the requests that ran then could end.

    Raises:
        RecmasError: RM201 without the extra `serve`, RM545 for options and addresses that are
            refused, RM4xx for bundles that cannot be loaded.
    """
    try:
        import fastapi  # noqa: F401 - here, so that the error names the extra
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="serve") from error
    from recmas_runtime.serve.operation.catalog import named_bundles
    from recmas_runtime.serve.operation.memory import (
        BundleNeeds,
        available_memory_bytes,
        fitting_batch,
    )
    from recmas_runtime.serve.operation.server import bind

    limits = _limits(options)
    settings = _http_settings(options)
    if not options.bundles and options.watch is None:
        raise fail("RM506", "give a BUNDLE or --watch FOLDER", hint=_HELP)
    if options.watch is not None and not options.watch.is_dir():
        raise fail("RM545", f"--watch {options.watch} is no folder", hint="Make it first.")
    bundles = named_bundles(options.bundles)
    warnings: list[Problem] = []
    max_batch = fitting_batch(
        map(BundleNeeds.of, bundles.values()),
        asked=limits.max_batch,
        kept_bytes=limits.kept_bytes,
        available_bytes=available_memory_bytes() if options.device in ("auto", "cpu") else None,
        problems=warnings,
    )
    problems += warnings
    for warning in warnings:
        note(str(warning))
    limits = replace(limits, max_batch=max_batch)
    sockets = bind(options.host, options.port)
    try:
        return asyncio.run(
            _serve(options, settings, limits, bundles, sockets, data, as_json=as_json)
        )
    except ServiceError as error:
        raise RecmasError(
            Problem(code=each.code, message=each.message, hint=each.hint) for each in error.problems
        ) from None
    finally:
        for each in sockets:
            each.close()


async def _serve(
    options: argparse.Namespace,
    settings: HttpSettings,
    limits: ServiceLimits,
    bundles: Mapping[str, Bundle],
    sockets: Sequence[socket.socket],
    data: dict[str, Any],
    *,
    as_json: bool,
) -> bool:
    from recmas_runtime.serve.http.app import make_app
    from recmas_runtime.serve.metrics import Metrics
    from recmas_runtime.serve.operation.admin import admin_router
    from recmas_runtime.serve.operation.catalog import Catalog, WatchedFolder
    from recmas_runtime.serve.operation.memory import available_memory_bytes
    from recmas_runtime.serve.operation.request_log import AccessLog, AnswerLog
    from recmas_runtime.serve.operation.server import Stop, serve_until
    from recmas_runtime.serve.process import WorkerService

    log = ServiceLog(sys.stderr, options.log_format)
    spans = _spans(options)
    stop = Stop(log)
    with stop.on_signals():
        paths = {name: str(bundle.root) for name, bundle in bundles.items()}
        starting = asyncio.create_task(
            WorkerService.start(
                paths, limits, log=log, device=options.device, threads=options.threads
            )
        )
        service = await _unless_stopped(stop, starting)
        if service is None:
            log.info(f"{stop.by}: stopped before it was ready")
            return True
        metrics = Metrics(service)
        service.observers.append(AnswerLog(log, with_texts=options.log_prompts))
        catalog = Catalog(service, available_memory_bytes)
        admin = admin_router(catalog, service, has_key=bool(settings.api_keys))
        app: App = make_app(service, settings, metrics=metrics, routes=admin.routes)
        app = AccessLog(app, log)
        if spans is not None:
            from recmas_runtime.serve.operation.spans import Spans, TraceParent

            service.observers.append(Spans(spans))
            app = TraceParent(app)
        watching: asyncio.Task[None] | None = None
        if options.watch is not None:
            folder = WatchedFolder(options.watch, catalog, service, log)
            await folder.look(at_once=True)
            watching = asyncio.create_task(folder.run())

        def when_ready() -> None:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            models = sorted(service.models)
            has_key = bool(settings.api_keys)
            data.update(url=url, models=models, pid=os.getpid(), key=has_key)
            line = json.dumps({"ready": True, **data}) if as_json else _hello(url, models, has_key)
            with suppress(BrokenPipeError):  # nobody reads it, and nobody needs to
                write_out(f"{line}\n")

        try:
            return await serve_until(
                stop,
                app,
                settings,
                service,
                sockets,
                log,
                grace_s=options.grace,
                when_ready=when_ready,
            )
        finally:
            if watching is not None:
                watching.cancel()
            await service.close(0.0)
            if spans is not None:
                await asyncio.to_thread(spans.shutdown)


async def _unless_stopped(stop: Stop, task: asyncio.Task[T]) -> T | None:
    """Wait for a task; None, with the task cancelled, if a signal comes first."""
    asked = asyncio.create_task(stop.asked.wait())
    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return None


def _hello(url: str, models: Sequence[str], has_key: bool) -> str:
    """Return the line that says where to ask, and how."""
    if not models:
        return f"Serving on {url}, with no models yet."
    body = {"model": models[0], "messages": [{"role": "user", "content": "Hello?"}]}
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    return (
        f"Serving {', '.join(models)} on {url}. Ask: curl {url}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def _spans(options: argparse.Namespace) -> TracerProvider | None:
    if options.otlp is None:
        return None
    try:
        from recmas_runtime.serve.operation.spans import otlp_provider
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="otel") from error
    return otlp_provider(options.otlp)


def _http_settings(options: argparse.Namespace) -> HttpSettings:
    """Return the settings of the HTTP side; a service without a key stays on this machine."""
    from recmas_runtime.serve.http.settings import HttpSettings

    keys = _api_keys(options.api_key_file)
    hosts = tuple(name for name in (options.allowed_hosts or "").split(",") if name)
    settings = HttpSettings(
        host=options.host,
        port=options.port,
        api_keys=keys,
        allowed_hosts=hosts,
        cors_origins=tuple(options.cors_origins),
        open_metrics=options.open_metrics,
        request_timeout_s=options.request_timeout,
    )
    if not settings.is_loopback and not keys and not options.insecure:
        raise fail(
            "RM545",
            f"--host {options.host} lets other machines ask, and there is no key",
            hint=f"Put a key into ${KEY_VARIABLE} or a file of --api-key-file, or pass --insecure.",
        )
    return settings


def _api_keys(file: Path | None) -> tuple[str, ...]:
    """Return the keys, and take them out of the environment, which other programs inherit."""
    variable = os.environ.pop(KEY_VARIABLE, None)
    if variable is not None and file is not None:
        message = f"keys come from ${KEY_VARIABLE} and from --api-key-file"
        raise fail("RM545", message, hint="Take one of them.")
    if variable is not None:
        found, place = [variable], f"${KEY_VARIABLE}"
    elif file is not None:
        found, place = _lines(file), str(file)
    else:
        return ()
    keys = tuple(key.strip() for key in found if key.strip())
    if not keys:  # somebody meant to have one
        raise fail("RM545", f"{place} holds no key", hint="Write one into it, or leave it away.")
    return keys


def _lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            return stream.read(_MAX_KEY_BYTES).decode("utf-8").splitlines()
    except OSError as error:
        message = f"--api-key-file {file} cannot be read: {reason_of(error)}"
    except UnicodeDecodeError:
        message = f"--api-key-file {file} holds no text"
    raise fail("RM545", message, hint="Name a file with a key on a line.")


def _limits(options: argparse.Namespace) -> ServiceLimits:
    bounds: dict[str, tuple[float, float]] = {
        "port": (0, 65535),
        "max_batch": (1, 2**16),
        "max_queue": (0, 2**20),
        "max_wait_ms": (1, 2**31),
        "request_timeout": (0.001, 2**31),
        "keep_memory": (0, 2**30),
        "grace": (0, 2**31),
    }
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            option = name.replace("_", "-")
            hint = f"It must be from {least:g} to {most:g}."
            raise fail("RM545", f"--{option} is {value:g}", hint=hint)
    wait_ms = options.max_wait_ms
    return ServiceLimits(
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_wait_s=None if wait_ms is None else wait_ms / 1e3,
        kept_bytes=options.keep_memory * 2**20,
    )
