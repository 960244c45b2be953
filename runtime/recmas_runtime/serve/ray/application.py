"""The HTTP application on Ray Serve: replicas, each with engines of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from ray import serve

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.codec import Count, Finite, Size, StrictStruct, to_json
from recmas_runtime.serve.http.app import make_app
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.operation.memory import BundleNeeds
from recmas_runtime.serve.service import ServiceError, ServiceLimits

KEY_VARIABLE: Final = "RECMAS_API_KEY"
# What Serve holds back beyond requests for answers: lists and probes.
_OTHER_REQUESTS: Final = 16


class ReplicaOptions(StrictStruct, frozen=True, kw_only=True):
    """What `app` takes; all but the bundle may be left out.

    Attributes:
        bundle: Its path, the same on every machine.
        model: What requests call it; empty for the system's name.
        cpus: Of a replica, which runs as many threads.
        gpus: Of a replica.
        max_batch: Requests that a replica runs at a time; None for the bundle's limit. Where more
            come to each replica than that, there will be more replicas.
        max_queue: Requests that may wait in a replica.
        max_wait_s: How long one may wait before it is refused; None for as long as it takes.
        request_timeout_s: In which an answer must be whole; None for as long as it takes.
        api_key_file: Keys that requests must have one of, a line each, on every machine; empty for
            the environment variable RECMAS_API_KEY of replicas.
        insecure: Answer without a key. What addresses Serve listens at, no replica knows.
        allowed_hosts: Host names that requests may name besides those of the machine itself, with
            commas between them; `*` for any.
        upscale_s: How long too many requests must come before there are more replicas.
        downscale_s: How long too few.
        grace_s: How long a replica that is to go may take for the requests that it has.
    """

    bundle: str
    model: str = ""
    min_replicas: Count = 1
    max_replicas: Count = 1
    cpus: Count = 1
    gpus: Finite = 0.0
    device: str = "auto"
    max_batch: Count | None = None
    max_queue: Size = 64
    max_wait_s: Finite | None = None
    request_timeout_s: Finite | None = None
    api_key_file: str = ""
    insecure: bool = False
    allowed_hosts: str = ""
    upscale_s: Finite = 10.0
    downscale_s: Finite = 300.0
    grace_s: Finite = 60.0


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Return what `serve run recmas_runtime.serve.ray:app bundle=PATH` deploys.

    Args:
        arguments: `ReplicaOptions` by name; a command line gives them as text.

    Raises:
        RecmasError: RM545 for arguments that are refused, RM40x if the path holds no bundle here.
    """
    try:
        options = msgspec.convert(dict(arguments), ReplicaOptions, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(ReplicaOptions.__struct_fields__)
        raise fail("RM545", f"arguments of app: {error}", hint=f"It takes {names}.") from error
    bundle = open_bundle(options.bundle)
    running = options.max_batch or bundle.plan.limits.max_batch
    most = 2 * (running + options.max_queue) + _OTHER_REQUESTS
    kept_bytes = ServiceLimits().kept_bytes
    needs = BundleNeeds.of(bundle).whole_bytes(max_batch=running, kept_bytes=kept_bytes)
    return (
        serve.deployment(
            name="recmas",
            ray_actor_options={
                "num_cpus": options.cpus,
                "num_gpus": options.gpus,
                "memory": needs,  # machines get as many replicas as fit
            },
            # Serve holds requests back without a word to the client, and its default is five:
            # a replica refuses by itself, with a reason and the time to come back.
            max_ongoing_requests=most,
            # While there is no replica at all, Serve does.
            max_queued_requests=most,
            backpressure_config={"status_code": 503, "retry_after_s": 5},
            autoscaling_config={
                "min_replicas": options.min_replicas,
                "max_replicas": max(options.min_replicas, options.max_replicas),
                "target_ongoing_requests": running,
                "upscale_delay_s": options.upscale_s,
                "downscale_delay_s": options.downscale_s,
            },
            health_check_period_s=5,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=options.grace_s,
            max_constructor_retry_count=3,
            # New replicas are ready before old ones go.
            max_surge_percent=50,
        )(serve.ingress()(_Replica))
    ).bind(to_json(options), options.model or bundle.plan.name)


class _Replica:
    """Engines and the application over them, in a process of the cluster."""

    async def __init__(self, options: dict[str, Any], model: str) -> None:  # type: ignore[misc]
        asked = msgspec.convert(options, ReplicaOptions)
        limits = ServiceLimits(
            max_batch=asked.max_batch, max_queue=asked.max_queue, max_wait_s=asked.max_wait_s
        )
        self._settings = _settings(asked)
        try:
            self._service = await LocalService.start(
                {model: asked.bundle}, limits, device=asked.device, threads=asked.cpus
            )
        except ServiceError as error:  # Ray shows what it can carry
            raise RuntimeError(str(error)) from None

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application of this replica; Ray asks for it by this name."""

        @asynccontextmanager
        async def served(_: FastAPI) -> AsyncIterator[None]:
            yield
            await self._service.close(0.0)

        return make_app(self._service, self._settings, lifespan=served)

    def check_health(self) -> None:
        """Raise if engines have ended; Ray then starts another replica."""
        if not self._service.is_alive:
            raise RuntimeError("the thread of the engines has ended")


def _settings(options: ReplicaOptions) -> HttpSettings:
    """Return the settings of the HTTP side, with keys unless they are not wanted."""
    if options.api_key_file:
        keys = Path(options.api_key_file).read_text(encoding="utf-8").split()
    else:
        keys = os.environ.pop(KEY_VARIABLE, "").split()
    if not keys and not options.insecure:
        raise fail(
            "RM545",
            "there is no key, and whoever reaches the cluster would be answered",
            hint=f"Give api_key_file=PATH, or replicas the variable {KEY_VARIABLE}; or "
            "insecure=true.",
        )
    return HttpSettings(
        api_keys=tuple(keys),
        allowed_hosts=tuple(filter(None, options.allowed_hosts.split(","))),
        request_timeout_s=options.request_timeout_s,
    )
