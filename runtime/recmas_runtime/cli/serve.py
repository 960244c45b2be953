"""`recmas serve`: bundles behind OpenAI's HTTP forms, until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_runtime.cli.serve_options import KEY_VARIABLE
from recmas_runtime.core.errors import Problem, RecmasError, fail, missing_package
from recmas_runtime.core.printing import note, write_out
from recmas_runtime.engines.devices import needs_gpu
from recmas_runtime.formats.bundle import Bundle
from recmas_runtime.formats.plan import filled_fields
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.operation.catalog import named_bundles
from recmas_runtime.serve.operation.memory import (
    BundleNeeds,
    available_memory_bytes,
    fitting_batch,
)
from recmas_runtime.serve.service import ServiceError, ServiceLimits

if TYPE_CHECKING:
    from recmas_runtime.serve.http.settings import HttpSettings
    from recmas_runtime.serve.keys import KeyFile

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
        from recmas_runtime.serve.operation.run import ServeSettings, run
        from recmas_runtime.serve.operation.server import bind
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="serve") from error
    limits = _limits(options)
    warnings: list[Problem] = []
    keys = _api_keys(options.api_key_file, warnings)
    http = _http_settings(options, keys.keys)
    if not options.bundles and options.watch is None:
        raise fail("RM506", "give a BUNDLE or --watch FOLDER", hint=_HELP)
    if options.watch is not None and not options.watch.is_dir():
        raise fail("RM545", f"--watch {options.watch} is no folder", hint="Make it first.")
    bundles = named_bundles(options.bundles)
    settings = ServeSettings(
        bundles={name: str(bundle.root) for name, bundle in bundles.items()},
        watch=options.watch,
        http=http,
        limits=_fitting(limits, bundles, options, warnings),
        device=options.device,
        threads=options.threads,
        grace_s=options.grace,
        log=ServiceLog(sys.stderr, options.log_format),
        log_texts=options.log_prompts,
        otlp=options.otlp,
        cache=options.cache,
    )

    for warning in warnings:
        note(str(warning))
    if options.json:
        problems += warnings

    def when_ready(url: str, models: Sequence[str]) -> None:
        data.update(url=url, models=[*models], pid=os.getpid(), key=bool(http.api_keys))
        ready = {"ready": True, **data}
        line = json.dumps(ready) if as_json else _hello(url, models, _authorization(keys), bundles)
        with suppress(BrokenPipeError):  # nobody reads it, and nobody needs to
            write_out(f"{line}\n")

    sockets = bind(options.host, options.port)
    try:
        return asyncio.run(run(settings, sockets, when_ready))
    except ServiceError as error:
        raise RecmasError(
            Problem(code=each.code, message=each.message, hint=each.hint) for each in error.problems
        ) from None
    finally:
        for each in sockets:
            each.close()


def _fitting(
    limits: ServiceLimits,
    bundles: Mapping[str, Bundle],
    options: argparse.Namespace,
    warnings: list[Problem],
) -> ServiceLimits:
    """Return limits that fit this machine's memory; that of accelerators is not known here."""
    max_batch = fitting_batch(
        map(BundleNeeds.of, bundles.values()),
        asked=limits.max_batch,
        kept_bytes=limits.kept_bytes,
        available_bytes=None if needs_gpu(options.device) else available_memory_bytes(),
        problems=warnings,
    )
    return replace(limits, max_batch=max_batch)


def _authorization(keys: KeyFile) -> str:
    """Return the option of curl that gives a key, which the shell looks up: it is never shown."""
    return f' -H "Authorization: Bearer {keys.in_shell or "KEY"}"' if keys.keys else ""


def _hello(
    url: str, models: Sequence[str], authorization: str, bundles: Mapping[str, Bundle]
) -> str:
    """Return the line that says where to ask, and how."""
    if not models:
        return f"Serving on {url}, with no models yet."
    body: dict[str, Any] = {"model": models[0]}
    body["messages"] = [{"role": "user", "content": "Hello?"}]
    if bundle := bundles.get(models[0]):
        plan = bundle.plan
        if others := plan.conversation.others(plan.fields):
            body["recmas"] = {"record": filled_fields(plan.fields, "...", only=others)}
    return (
        f"Serving {', '.join(models)} on {url}. Ask: curl {url}/v1/chat/completions{authorization} "
        f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    )


def _http_settings(options: argparse.Namespace, keys: tuple[str, ...]) -> HttpSettings:
    """Return the settings of the HTTP side; a service without a key stays on this machine."""
    from recmas_runtime.serve.http.settings import HttpSettings

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
    if "*" in settings.cors_origins and not keys and not options.insecure:
        raise fail(
            "RM545",
            "--cors-origin * lets every page that a browser here opens ask, and there is no key",
            hint=f"Name the origins, put a key into ${KEY_VARIABLE}, or pass --insecure.",
        )
    return settings


def _api_keys(file: Path | None, warnings: list[Problem]) -> KeyFile:
    """Return the keys, and take them out of the environment, which other programs inherit."""
    from recmas_runtime.serve.keys import KeyFile, check_key, read_key_file

    variable = os.environ.pop(KEY_VARIABLE, None)
    if variable is not None and file is not None:
        message = f"keys come from ${KEY_VARIABLE} and from --api-key-file"
        raise fail("RM545", message, hint="Take one of them.")
    if file is not None:
        return read_key_file(file, warnings)
    if variable is None:
        return KeyFile(keys=(), in_shell="")
    if not (key := variable.strip()):  # somebody meant to have one
        message = f"${KEY_VARIABLE} holds no key"
        raise fail("RM545", message, hint="Write one into it, or leave it away.")
    check_key(key, file=f"${KEY_VARIABLE}")
    return KeyFile(keys=(key,), in_shell=f"${KEY_VARIABLE}")


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
