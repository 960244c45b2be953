"""What a service counts and measures, in the form that Prometheus reads.

Everything is seen from outside of the engines: requests as they pass, and what the engines tell of
themselves once a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from recmas_runtime.serve.protocol import Ask, Done, Gauges, Piece, Read, Step, WasRead
from recmas_runtime.serve.service import Service, ServiceError

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64)
# Of the label `model` where a request names none that is loaded: labels come from nobody outside.
_NO_MODEL: Final = ""
_USAGE: Final = ("prompt", "latent", "completion", "cached")
_REMOTE: Final = ("prompt", "completion")


class Metrics:
    """Observes a service; `render` is what a scrape gets.

    Attributes:
        content_type: Of that page.
        running: Requests whose steps run, and all for readings.
        waiting: Requests whose first step has not come.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._service = service
        self.running = self.waiting = 0
        disable_created_metrics()  # type: ignore[no-untyped-call] # as many lines again
        self._registry = CollectorRegistry()
        self.requests = Counter(
            *("recmas_requests", "Requests for answers and readings, by how they ended."),
            ("model", "kind", "how"),
            registry=self._registry,
        )
        self.refusals = Counter(
            *("recmas_refusals", "Requests without an answer, by whose matter that is."),
            ("reason", "code"),
            registry=self._registry,
        )
        self.tokens = self._counter("tokens", "Tokens and latent steps of answers.", "kind")
        self.queue = self._seconds("queue", "Time until the first step of a request.")
        self.first_token = self._seconds("time_to_first_token", "Time until text comes.")
        self.latent = self._seconds("latent_phase", "From the first step until text is written.")
        self.request = self._seconds("request", "From a request to the end of its answer.")
        self.agents = Summary(
            *("recmas_agent_seconds", "Time of an agent's steps of one kind in one round."),
            ("model", "agent", "round", "op"),
            registry=self._registry,
        )
        self._responses = Summary(
            *("recmas_http_seconds", "Time of responses over HTTP."),
            ("route", "status"),
            registry=self._registry,
        )
        self._registry.register(_ServiceState(service, self))
        service.observers.append(self)

    def begin(self, request: Ask | Read) -> _Watch | _ReadWatch:
        """Count a request; see `Observer`."""
        model = request.model if request.model in self._service.models else _NO_MODEL
        return _Watch(self, model) if isinstance(request, Ask) else _ReadWatch(self, model)

    def count_end(self, model: str, kind: str, error: ServiceError | None, *, done: bool) -> None:
        """Count how a request ended."""
        how = "answered" if done else "left" if error is None else error.reason
        self.requests.labels(model, kind, how).inc()
        if error is not None:
            self.on_refusal(error.reason, error.problems[0].code)

    def on_refusal(self, reason: str, code: str) -> None:
        """Count a request without an answer."""
        self.refusals.labels(reason, code).inc()

    def on_response(self, route: str, status: int, seconds: float) -> None:
        """Count a response over HTTP, by the declared path that it belongs to."""
        self._responses.labels(route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, label: str) -> Counter:
        return Counter(f"recmas_{name}", about, ("model", label), registry=self._registry)

    def _seconds(self, name: str, about: str) -> Histogram:
        name = f"recmas_{name}_seconds"
        return Histogram(name, about, ("model",), buckets=_SECONDS, registry=self._registry)


class _Watch:
    """Measures one request for an answer."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._began = time.perf_counter()
        self._first_step: float | None = None
        self._wrote = self._done = False
        self._step: tuple[Step, float] | None = None  # the one that runs, and since when
        metrics.waiting += 1

    def event(self, event: Step | Piece | Done | WasRead) -> None:
        now, metrics, model = time.perf_counter(), self._metrics, self._model
        if self._first_step is None:
            self._first_step = now
            metrics.waiting -= 1
            metrics.running += 1
            metrics.queue.labels(model).observe(now - self._began)
        if isinstance(event, Step):
            self._end_step(now)
            self._step = event, now
            if event.op == "decode":
                metrics.latent.labels(model).observe(now - self._first_step)
        elif not self._wrote:
            self._wrote = True
            metrics.first_token.labels(model).observe(now - self._began)
        if isinstance(event, Done):
            self._done = True
            self._end_step(now)
            metrics.request.labels(model).observe(now - self._began)
            self._count_tokens(event)

    def end(self, error: ServiceError | None) -> None:
        metrics = self._metrics
        if self._first_step is None:
            metrics.waiting -= 1
        else:
            metrics.running -= 1
        metrics.count_end(self._model, "answer", error, done=self._done)

    def _end_step(self, now: float) -> None:
        if self._step is None:
            return
        step, began = self._step
        self._step = None
        if step.op == "send":  # what links compute; no agent runs
            return
        for agent in step.agents:
            labels = self._model, agent, str(step.round), step.op
            self._metrics.agents.labels(*labels).observe(now - began)

    def _count_tokens(self, done: Done) -> None:
        usage: dict[str, Any] = done.answer["usage"]
        # Text that agents write for each other is completion too: the engine writes it.
        written = usage["completion_tokens"] + usage["handover_tokens"]
        counts = usage["prompt_tokens"], usage["latent_steps"], written, done.cached_tokens
        for kind, count in zip(_USAGE, counts, strict=True):
            self._metrics.tokens.labels(self._model, kind).inc(count)
        for model in usage.get("remote", {}).values():
            for kind in _REMOTE:
                labels = self._model, f"remote_{kind}"
                self._metrics.tokens.labels(*labels).inc(model[f"{kind}_tokens"])


class _ReadWatch:
    """Counts one request for a reading; it tells of no steps, so it runs from the beginning."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._done = False
        metrics.running += 1

    def event(self, event: Step | Piece | Done | WasRead) -> None:
        self._done = isinstance(event, WasRead)

    def end(self, error: ServiceError | None) -> None:
        self._metrics.running -= 1
        self._metrics.count_end(self._model, "read", error, done=self._done)


class _ServiceState(Collector):
    """What a service is in the moment of a scrape."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield what is read and not counted."""
        service, metrics = self._service, self._metrics
        yield _gauge("requests_running", "Requests whose steps run.", metrics.running)
        yield _gauge("requests_waiting", "Requests whose first step has not come.", metrics.waiting)
        yield _gauge("models", "Models that are loaded.", len(service.models))
        yield _gauge("ready", "Whether requests are taken.", int(service.is_ready))
        yield _count("worker_restarts", "Workers in place of one that died.", service.num_restarts)
        if (size := _resident_bytes(service.worker_pid)) is not None:
            yield _gauge("worker_resident_bytes", "Resident memory of the worker process.", size)
        if service.gauges is not None:
            yield from _engine_metrics(service.gauges)


def _engine_metrics(gauges: Gauges) -> Iterator[Metric]:
    """Yield what engines tell of themselves; counts begin anew with a new worker."""
    yield _gauge("cache_bytes", "Caches of requests that run.", gauges.cache_bytes)
    yield _gauge("kept_bytes", "Kept beginnings of prompts.", gauges.kept_bytes)
    yield _count("chunk_tokens", "Prompt tokens that engines have read.", gauges.chunk_tokens)
    yield _count("hit_tokens", "Prompt tokens taken from kept beginnings.", gauges.hit_tokens)
    phases = CounterMetricFamily(
        "recmas_engine_seconds", "Time in engine calls, by phase.", labels=("phase",)
    )
    for phase, ms in gauges.phase_ms.items():
        phases.add_metric((phase,), ms / 1e3)
    yield phases
    rows = {int(count): steps for count, steps in gauges.rows_per_step.items()}
    below = [
        (f"{most:.1f}", sum(n for count, n in rows.items() if count <= most)) for most in _ROWS
    ]
    yield HistogramMetricFamily(
        "recmas_rows_per_step",
        "Rows that share an engine call.",
        buckets=[*below, ("+Inf", sum(rows.values()))],
        sum_value=sum(count * steps for count, steps in rows.items()),
    )


def _resident_bytes(pid: int | None) -> int | None:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except OSError:  # no worker, or a system without such files
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"recmas_{name}", about, value=value)


def _count(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"recmas_{name}", about, value=value)
