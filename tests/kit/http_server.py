"""The HTTP front end in a thread of the tests, over real engines or over scripted ones."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from msgspec import structs

from recmas_runtime.formats.plan import ServePlan
from recmas_runtime.serve.http.app import make_app
from recmas_runtime.serve.http.server import uvicorn_config
from recmas_runtime.serve.http.settings import HttpSettings
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import (
    AnyRequest,
    Ask,
    Cancel,
    Done,
    Failed,
    ModelInfo,
    Piece,
    ProblemInfo,
    Reason,
    Step,
)
from recmas_runtime.serve.service import Service, ServiceError, ServiceLimits

OpenService = Callable[[], Any]  # called in the server's event loop


@dataclass
class Served:
    """A running server."""

    port: int
    service: Service
    loop: asyncio.AbstractEventLoop = field(repr=False)
    http: httpx.Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.http = self.client()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False, **options)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers=headers)

    def raw(self, data: bytes, *, timeout_s: float = 10.0) -> bytes:
        """Send bytes and return all that comes until the server closes, also while we send."""
        parts = []
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as link:
            with suppress(OSError):
                link.sendall(data)
                link.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while part := link.recv(2**16):
                    parts.append(part)
        return b"".join(parts)


@contextmanager
def serving(
    open_service: OpenService, settings: HttpSettings | None = None, **options: Any
) -> Iterator[Served]:
    """Run a server on a free port until the context ends."""
    ready: threading.Event = threading.Event()
    served: list[Served] = []
    failed: list[BaseException] = []
    stop: list[Callable[[], object]] = []
    used = replace(settings or HttpSettings(), port=0)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        service = await open_service()
        try:
            app = make_app(service, used, **options)
            server = uvicorn.Server(uvicorn_config(app, used, grace_s=1))
            task = asyncio.create_task(server.serve())
            while not server.started:
                assert not task.done(), "the server ended before it had begun"
                await asyncio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            served.append(Served(port=port, service=service, loop=loop))
            ready.set()
            await ended.wait()
            server.should_exit = True
            await task
        finally:
            await service.close(0.0)

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="server")
    thread.start()
    ready.wait()
    try:
        if failed:
            raise failed[0]
        yield served[0]
    finally:
        for each in served:
            each.http.close()
        stop[0]()
        thread.join()
    if failed:
        raise failed[0]


def local(bundles: Mapping[str, Path], limits: ServiceLimits | None = None) -> OpenService:
    """Return what loads bundles, by name."""
    named = {name: str(path) for name, path in bundles.items()}
    return lambda: LocalService.start(named, limits, threads=1)


MODEL = ModelInfo(
    name="scripted",
    system="scripted",
    rounds=3,
    answer_agent="solver",
    agents=(),
    links=(),
    fields=("question",),
    max_new_tokens=64,
    default_max_tokens=8,
    max_batch=4,
    bytes_per_request=0,
    has_tools=False,
    digest="0" * 64,
    created=1_700_000_000,
    loads_ms=2500.0,
    serve=ServePlan(fields={"question": "last_user"}),
)

USAGE = {"prompt_tokens": 10, "latent_steps": 6, "handover_tokens": 3, "completion_tokens": 2}


def answer(text: str, **keys: Any) -> dict[str, Any]:
    """Return an answer as `Answer.to_json` has it."""
    return {
        "id": "1",
        "record": {},
        "answer": text,
        "finish_reason": "stop",
        "rounds": 3,
        "usage": USAGE,
        "timing_ms": {"total": 1.0},
        "batch_size": 1,
        "tool_calls": [],
        **keys,
    }


# What engines say, in order: events, and seconds in which they say nothing.
Script = Sequence[float | Step | Piece | Done | Failed]


def step(op: str = "think", round_: int = 1) -> Step:
    return Step(id=0, op=op, round=round_, rounds=3, agents=("critic",))


def piece(text: str) -> Piece:
    return Piece(id=0, text=text)


def done(text: str, **keys: Any) -> Done:
    return Done(id=0, answer=answer(text, **keys))


def failed(reason: Reason, code: str, message: str) -> Failed:
    problem = ProblemInfo(code=code, message=message, hint="Do something else.")
    return Failed(id=0, reason=reason, problems=(problem,))


class ScriptedEngines(Service):
    """A service whose engines say what a script has, at its pace.

    Attributes:
        asked: What came, in order.
        cancelled: Ids of what was cancelled.
    """

    def __init__(self, script: Script, limits: ServiceLimits | None = None) -> None:
        super().__init__(limits or ServiceLimits())
        self.models = {MODEL.name: MODEL}
        self.is_ready = True
        self.script = script
        self.asked: list[Ask] = []
        self.cancelled: list[int] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def _send(self, request: AnyRequest) -> None:
        match request:
            case Ask():
                self.asked.append(request)
                self._tasks[request.id] = asyncio.create_task(self._say(request.id, self.script))
            case Cancel():
                self.cancelled.append(request.id)
                self._tasks[request.id].cancel()
            case _:
                raise AssertionError(f"not in the script: {request}")

    async def _say(self, id_: int, script: Script) -> None:
        for each in script:
            if isinstance(each, int | float):
                await asyncio.sleep(each)
            else:
                self.dispatch(structs.replace(each, id=id_))

    async def close(self, grace_s: float) -> None:
        self.is_ready = False
        self.fail_open(ServiceError.of("stopped", "RM542", "the service ends", ""))
        for task in self._tasks.values():
            task.cancel()


def scripted(script: Script, limits: ServiceLimits | None = None) -> OpenService:
    """Return what starts engines with a script."""

    async def start() -> ScriptedEngines:
        return ScriptedEngines(script, limits)

    return start


def chunks(text: str) -> list[dict[str, Any]]:
    """Return the JSON of a stream's events, which must end with `[DONE]`."""
    lines = [each[6:] for each in text.split("\n") if each.startswith("data: ")]
    assert lines[-1] == "[DONE]", text
    return [json.loads(each) for each in lines[:-1]]


def one_by_one(*scripts: Script) -> OpenService:
    """Return what starts engines with a script for each request; the last one stays."""

    class Engines(ScriptedEngines):
        def _send(self, request: AnyRequest) -> None:
            if isinstance(request, Ask):
                self.script = scripts[min(len(self.asked), len(scripts) - 1)]
            super()._send(request)

    async def start() -> ScriptedEngines:
        return Engines(())

    return start
