"""Requests as spans of OpenTelemetry, under the names that its conventions for GenAI give.

A request is one span; the time of each agent in each round is a span within it. Where whoever asks
sends a `traceparent`, the spans belong to that trace. Texts are in none of them.
"""

from __future__ import annotations

from typing import Any, Final

from opentelemetry import context as contexts
from opentelemetry import propagate
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from recmas_runtime.core.errors import fail, missing_package
from recmas_runtime.serve.operation.asgi import App, Receive, Scope, Send
from recmas_runtime.serve.protocol import Ask, Done, Piece, Read, Step, WasRead
from recmas_runtime.serve.service import ServiceError

_PROVIDER: Final = "recmas"
# Settings of sampling that have a name of their own.
_SAMPLING: Final = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
}


def otlp_provider(endpoint: str) -> TracerProvider:
    """Return what sends spans to a collector, by OTLP over HTTP, in batches.

    Raises:
        RecmasError: RM201 if the exporter is not installed, RM545 for an address that is none.
    """
    if not endpoint.startswith(("http://", "https://")):
        hint = "Give the collector's address, such as http://127.0.0.1:4318/v1/traces."
        raise fail("RM545", f"--otlp {endpoint!r} is no address of HTTP", hint=hint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="otel") from error
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": _PROVIDER}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Spans:
    """Observes a service."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("recmas")

    def begin(self, request: Ask | Read) -> _Watch:
        """Begin the span of a request; see `Observer`."""
        return _Watch(self._tracer, request)


class _Watch:
    """The spans of one request."""

    def __init__(self, tracer: Tracer, request: Ask | Read) -> None:
        self._tracer = tracer
        attributes = _request_attributes(request)
        name = f"{attributes['gen_ai.operation.name']} {request.model}"
        self._span = tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=attributes)
        self._within = set_span_in_context(self._span)
        self._agents: dict[tuple[str, int], Span] = {}  # those that run

    def event(self, event: Step | Piece | Done | WasRead) -> None:
        if isinstance(event, Done):
            self._end_agents()
            self._span.set_attributes(_answer_attributes(event))
        elif isinstance(event, Step):
            # What links compute belongs to the agent whose message they carry.
            agents = event.agents[:1] if event.op == "send" else event.agents
            running = {(agent, event.round): None for agent in agents}
            self._end_agents(but=running)
            for agent, number in running:
                if (agent, number) not in self._agents:
                    self._agents[agent, number] = self._begin_agent(agent, number)

    def end(self, error: ServiceError | None) -> None:
        self._end_agents()
        if error is not None:
            self._span.set_attribute("error.type", error.problems[0].code)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()

    def _begin_agent(self, agent: str, number: int) -> Span:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": _PROVIDER,
            "gen_ai.agent.name": agent,
            "recmas.round": number,
        }
        return self._tracer.start_span(
            f"invoke_agent {agent}", context=self._within, attributes=attributes
        )

    def _end_agents(self, but: dict[tuple[str, int], None] | None = None) -> None:
        for key in [key for key in self._agents if key not in (but or {})]:
            self._agents.pop(key).end()


def _request_attributes(request: Ask | Read) -> dict[str, Any]:
    sampling = request.sampling if isinstance(request, Ask) else {}
    return {
        "gen_ai.operation.name": "chat" if isinstance(request, Ask) else "text_completion",
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": request.model,
        **{name: sampling[key] for key, name in _SAMPLING.items() if key in sampling},
    }


def _answer_attributes(done: Done) -> dict[str, Any]:
    answer, usage = done.answer, done.answer["usage"]
    return {
        "gen_ai.response.finish_reasons": [answer["finish_reason"]],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"] + usage["handover_tokens"],
        "recmas.usage.latent_steps": usage["latent_steps"],
        "recmas.usage.cached_tokens": done.cached_tokens,
        "recmas.rounds": answer["rounds"],
    }


class TraceParent:
    """An ASGI application within the trace that a request names in its header `traceparent`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        token = contexts.attach(propagate.extract(headers))
        try:
            await self._app(scope, receive, send)
        finally:
            contexts.detach(token)
