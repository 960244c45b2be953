"""Parts of a running service, each alone: log, memory, metrics, spans, connections."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai

from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.metrics import Metrics
from recmas_runtime.serve.operation import server
from recmas_runtime.serve.operation.asgi import Receive, Scope, Send
from recmas_runtime.serve.operation.memory import (
    BundleNeeds,
    available_memory_bytes,
    fitting_batch,
)
from recmas_runtime.serve.operation.request_log import AnswerLog
from recmas_runtime.serve.operation.spans import Spans, TraceParent
from recmas_runtime.serve.protocol import Ask, Gauges, Read
from recmas_runtime.serve.service import ServiceError, ServiceLimits

FOREIGN = 'a\n2026-01-01 forged\x1b[2J" x=\u202e'


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_is_a_line_whatever_is_in_it(form: str) -> None:
    stream = io.StringIO()
    log = ServiceLog(stream, form)  # type: ignore[arg-type]
    log.info("http", path=FOREIGN, nothing=None, record={"q": FOREIGN}, ms=1.49999999, count=3)
    log.error(FOREIGN)
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert "\x1b" not in text
    assert "\u202e" not in text
    if form == "json":
        first, second = map(json.loads, text.splitlines())
        assert (first["path"], first["record"], first["level"]) == (FOREIGN, {"q": FOREIGN}, "info")
        assert "nothing" not in first
        assert first["ms"] == 1.5
        assert (second["event"], second["level"]) == (FOREIGN, "error")
    else:
        assert " info    http path=" in text
        assert text.splitlines()[0].endswith("ms=1.5 count=3")


def test_a_log_that_takes_nothing_is_no_error(tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    stream.close()
    ServiceLog(stream).info("nobody reads this")


NEEDS = BundleNeeds(weight_bytes=1000, bytes_per_request=100, max_batch=8)


@pytest.mark.parametrize(
    ("asked", "available", "expected"),
    [(None, 2000, None), (None, 1810, None), (None, 1809, 7), (4, 1410, 4), (100, 11010, 100),
     (None, None, None), (9, None, 9)],
)  # fmt: skip
def test_requests_that_fit(asked: int | None, available: int | None, expected: int | None) -> None:
    problems: list[Problem] = []
    found = fitting_batch(
        [NEEDS], asked=asked, kept_bytes=10, available_bytes=available, problems=problems
    )
    assert found == expected
    assert [problem.code for problem in problems] == ["RM551"] * (expected == 7)


@pytest.mark.parametrize(
    ("asked", "available", "fits"), [(9, 1809, 7), (None, 1109, 0), (None, 900, 0), (1, 900, 0)]
)
def test_requests_that_do_not_fit(asked: int | None, available: int, fits: int) -> None:
    with pytest.raises(RecmasError, match=rf"RM545.*: {fits} would fit") as failed:
        fitting_batch([NEEDS], asked=asked, kept_bytes=10, available_bytes=available, problems=[])
    assert "--max-batch" in str(failed.value)


def test_several_bundles_share_the_memory() -> None:
    other = BundleNeeds(weight_bytes=500, bytes_per_request=200, max_batch=2)
    problems: list[Problem] = []
    found = fitting_batch(
        [NEEDS, other], asked=None, kept_bytes=0, available_bytes=2500, problems=problems
    )
    assert found == 5  # the larger cache for each
    assert "8 requests at a time take 1.50 kB" in problems[0].message


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4096),
        ({"memory.max": "max", "memory.current": "7"}, 4096),
        ({"memory.max": "1000", "memory.current": "700"}, 300),
        (
            {"memory.max": "1000", "memory.current": "700", "memory.stat": "inactive_file 200\n"},
            500,
        ),
        ({"memory.max": "9000", "memory.current": "700"}, 4096),
        ({"memory.max": "1000", "memory.current": "1700"}, 0),
        (
            {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "400",
             "memory/memory.stat": "total_inactive_file 50"},
            650,
        ),
    ],
)  # fmt: skip
def test_memory_of_machines_and_containers(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8 kB\nMemAvailable:       4 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory_bytes(meminfo, tmp_path) == expected


def test_memory_that_nobody_tells_of(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path / "none", tmp_path) is None


GAUGES = Gauges(
    running=2,
    waiting=1,
    rows_per_step={"1": 10, "3": 5, "100": 1},
    chunk_tokens=40,
    hit_tokens=8,
    cache_bytes=1024,
    kept_bytes=2048,
    phase_ms={"step": 1500.0},
)


def test_what_engines_tell_as_metrics() -> None:
    async def run() -> str:
        service = LocalService(ServiceLimits())
        metrics = Metrics(service)
        service.dispatch(GAUGES)
        return metrics.render().decode()

    lines = asyncio.run(run()).splitlines()
    for line in (
        'recmas_rows_per_step_bucket{le="1.0"} 10.0',
        'recmas_rows_per_step_bucket{le="4.0"} 15.0',
        'recmas_rows_per_step_bucket{le="64.0"} 15.0',
        'recmas_rows_per_step_bucket{le="+Inf"} 16.0',
        "recmas_rows_per_step_count 16.0",
        "recmas_rows_per_step_sum 125.0",
        "recmas_cache_bytes 1024.0",
        "recmas_kept_bytes 2048.0",
        "recmas_chunk_tokens_total 40.0",
        "recmas_hit_tokens_total 8.0",
        'recmas_engine_seconds_total{phase="step"} 1.5',
        "recmas_ready 0.0",
    ):
        assert line in lines


async def _ask(service: LocalService, question: str, model: str = "m", **sampling: object) -> None:
    ask = Ask(id=0, model=model, record={"question": question}, sampling=sampling)
    async for _ in service.ask(ask):
        pass


def test_the_docs_name_every_metric(hand_bundle: Path) -> None:
    async def run() -> str:
        service = await LocalService.start({"m": str(hand_bundle)}, threads=1)
        metrics = Metrics(service)
        metrics.on_response("/v1/models", 200, 0.1)
        service.worker_pid = os.getpid()
        await _ask(service, "1")
        with suppress(ServiceError):
            await _ask(service, "1", "none")
        service.dispatch(GAUGES)
        await service.close(1.0)
        return metrics.render().decode()

    families = re.findall(r"^# TYPE (\w+) ", asyncio.run(run()), re.M)
    page = (Path(__file__).parents[2] / "docs/deploying.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `recmas_")]
    assert sorted(re.findall(r"recmas_\w+", "".join(rows))) == sorted(families)


def test_refusals_are_counted_without_names_from_outside(hand_bundle: Path) -> None:
    async def run() -> str:
        service = await LocalService.start({"m": str(hand_bundle)}, threads=1)
        metrics = Metrics(service)
        for question, model in (("1", "m"), ("1", 'evil"}'), ("1" * 200, "m")):
            with suppress(ServiceError):
                await _ask(service, question, model)
        left = service.ask(Ask(id=0, model="m", record={"question": "Z"}))
        await anext(left)
        assert (metrics.running, metrics.waiting) == (1, 0)
        await left.aclose()  # type: ignore[attr-defined]
        assert (metrics.running, metrics.waiting) == (0, 0)
        await service.close(1.0)
        return metrics.render().decode()

    text = asyncio.run(run())
    assert 'recmas_requests_total{how="answered",kind="answer",model="m"} 1.0' in text
    assert 'recmas_requests_total{how="left",kind="answer",model="m"} 1.0' in text
    assert 'recmas_requests_total{how="input",kind="answer",model=""} 1.0' in text
    assert 'recmas_refusals_total{code="RM540",reason="input"} 1.0' in text
    assert 'recmas_refusals_total{code="RM501",reason="input"} 1.0' in text
    assert "evil" not in text


def test_an_answer_that_takes_too_long_and_a_text_that_is_read(hand_bundle: Path) -> None:
    stream = io.StringIO()

    async def run() -> str:
        service = await LocalService.start({"m": str(hand_bundle)}, threads=1)
        metrics = Metrics(service)
        service.observers.append(AnswerLog(ServiceLog(stream, "json"), with_texts=False))
        ask = Ask(id=0, model="m", record={"question": "Z"}, sampling={"max_new_tokens": 3900})
        with pytest.raises(ServiceError, match=r"RM547: there was no answer within 0\.2 s"):
            async for _ in service.ask(ask, limit_s=0.2):
                pass
        assert len((await service.read(Read(id=0, model="m", text="12"))).tokens) == 2
        with pytest.raises(ServiceError, match="RM547: the text was not read within 0 s"):
            await service.read(Read(id=0, model="m", text="12"), limit_s=0.0)
        with pytest.raises(ServiceError):
            await service.read(Read(id=0, model="m", text=()))
        assert (metrics.running, metrics.waiting) == (0, 0)
        await service.close(1.0)
        return metrics.render().decode()

    text = asyncio.run(run())
    for line in (
        'recmas_requests_total{how="timeout",kind="answer",model="m"} 1.0',
        'recmas_requests_total{how="answered",kind="read",model="m"} 1.0',
        'recmas_requests_total{how="timeout",kind="read",model="m"} 1.0',
        'recmas_requests_total{how="input",kind="read",model="m"} 1.0',
        'recmas_refusals_total{code="RM547",reason="timeout"} 2.0',
    ):
        assert line in text.splitlines()
    late, read, *_ = map(json.loads, stream.getvalue().splitlines())
    assert (late["event"], late["how"], late["code"]) == ("no answer", "timeout", "RM547")
    assert (read["event"], read["tokens"]) == ("read", 2)


def test_answers_are_logged_without_texts_unless_somebody_wants_them(hand_bundle: Path) -> None:
    stream, whole = io.StringIO(), io.StringIO()

    async def run() -> None:
        service = await LocalService.start({"m": str(hand_bundle)}, threads=1)
        service.observers += (
            AnswerLog(ServiceLog(stream, "json"), with_texts=False),
            AnswerLog(ServiceLog(whole, "json"), with_texts=True),
        )
        await _ask(service, "7")
        with pytest.raises(ServiceError):
            await _ask(service, "7", temperature=-1.0)
        await service.close(1.0)

    asyncio.run(run())
    answered, refused = map(json.loads, stream.getvalue().splitlines())
    assert (answered["event"], answered["completion_tokens"]) == ("answer", 2)
    assert (refused["event"], refused["how"], refused["code"]) == ("no answer", "input", "RM505")
    assert "record" not in answered
    assert "reason" not in refused, "messages on input quote it"
    answered, refused = map(json.loads, whole.getvalue().splitlines())
    assert (answered["record"], answered["answer"]) == ({"question": "7"}, "h")
    assert refused["reason"].startswith("RM505: temperature is -1")


def test_a_request_is_a_span_and_each_agent_in_each_round(hand_bundle: Path) -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))

    async def run() -> None:
        service = await LocalService.start({"m": str(hand_bundle)}, threads=1)
        service.observers.append(Spans(provider))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await _ask(service, "7", temperature=0.0, seed=3)

        header = (b"traceparent", b"00-0123456789abcdef0123456789abcdef-0123456789abcdef-01")
        unused: object = None
        await TraceParent(app)({"type": "http", "headers": [header]}, unused, unused)  # type: ignore[arg-type]
        with pytest.raises(ServiceError):
            await _ask(service, "7", "none")
        await service.close(1.0)

    asyncio.run(run())
    *agents, chat, refused = kept.get_finished_spans()
    assert chat.name == "chat m"
    assert chat.parent is not None
    assert chat.parent.trace_id == 0x0123456789ABCDEF0123456789ABCDEF
    attributes = dict(chat.attributes or {})
    for name, value in {
        gen_ai.GEN_AI_OPERATION_NAME: gen_ai.GenAiOperationNameValues.CHAT.value,
        gen_ai.GEN_AI_PROVIDER_NAME: "recmas",
        gen_ai.GEN_AI_REQUEST_MODEL: "m",
        gen_ai.GEN_AI_REQUEST_TEMPERATURE: 0.0,
        gen_ai.GEN_AI_REQUEST_SEED: 3,
        gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: ("stop",),
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 34,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 2,
        "recmas.usage.latent_steps": 6,
    }.items():
        assert attributes[name] == value, name
    told = [
        (span.attributes[gen_ai.GEN_AI_AGENT_NAME], span.attributes["recmas.round"])
        for span in agents
        if span.attributes is not None
    ]
    assert told == [("planner", 1), ("solver", 1), ("planner", 2), ("solver", 2)]
    assert {span.parent.span_id for span in agents if span.parent} == {chat.context.span_id}
    for span in agents:
        assert span.attributes is not None
        operation = span.attributes[gen_ai.GEN_AI_OPERATION_NAME]
        assert operation == gen_ai.GenAiOperationNameValues.INVOKE_AGENT.value
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "RM540"
    assert not refused.status.is_ok


async def _hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]}
    )
    await send({"type": "http.response.body", "body": b"hello"})


def test_connections_that_ask_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEEP_ALIVE_S", 1.0)

    async def run() -> None:
        log = ServiceLog(io.StringIO())
        stop = server.Stop(log)
        sockets = server.bind("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        ready = asyncio.Event()
        serving = asyncio.create_task(
            server.serve_until(
                stop,
                _hello,
                HttpSettings(),
                await LocalService.start({}),
                sockets,
                log,
                grace_s=1.0,
                when_ready=ready.set,
            )
        )
        await ready.wait()
        loop = asyncio.get_running_loop()

        async def closed_after(first: bytes, drop: bytes) -> float:
            """Return when a connection is closed that sends no whole head of a request."""
            start = loop.time()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
            end = asyncio.create_task(reader.read())
            while not end.done():
                await asyncio.sleep(0.05)
                writer.write(drop)
            assert await end == b""
            writer.close()
            return loop.time() - start

        # The second one never pauses for as long as it may.
        waits = closed_after(b"", b""), closed_after(b"GET / HTTP/1.1\r\n", b"X: y\r\n")
        async with asyncio.timeout(20):
            assert min(await asyncio.gather(*waits)) > 0.9
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(4):  # one that asks is kept from request to request
            await asyncio.sleep(0.3)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        stop.note("SIGTERM")
        assert await serving

    asyncio.run(run())


def test_an_address_that_waits_until_engines_are_loaded() -> None:
    """Nobody gets a connection that nobody answers."""

    async def run() -> None:
        (bound,) = server.bind("127.0.0.1", 0)
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        bound.listen()
        with pytest.raises(RecmasError, match=f"RM545.*port {port} is in use on 127.0.0.1"):
            server.bind("127.0.0.1", port)
        bound.close()

    asyncio.run(run())
