"""A service whose engines run in a process of their own, which is started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import msgspec
from msgspec import structs

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.serve.log import ServiceLog, cut
from recmas_runtime.serve.protocol import (
    MAX_LINE_BYTES,
    AnyEvent,
    AnyRequest,
    Ask,
    Cancel,
    Failed,
    Gauges,
    ModelInfo,
    ProblemInfo,
    Read,
)
from recmas_runtime.serve.service import Service, ServiceError, ServiceLimits
from recmas_runtime.serve.wire import EVENTS, WorkerSettings, to_line

_WORKER: Final = "recmas_runtime.serve.worker_main"
# A worker that lived so long did not die of how it was started.
_SETTLED_S: Final = 60.0
_FIRST_DELAY_S: Final = 0.25
_MOST_DELAY_S: Final = 30.0
_MOST_LOST_S: Final = 5.0  # looks at a bundle that is broken
_LAST_STEP_S: Final = 1.0
# A worker tells of itself every second while it has something to do, but for an engine call (half a
# minute for a 7B backbone on two cores), or a tool where runs share no calls.
_SILENT_S: Final = 300.0
_LISTENS: Final = 24  # times within that
_HINT: Final = "Ask again in a few seconds."


class WorkerService(Service):
    """Engines in a worker process: whatever happens to them, the front end goes on.

    When the worker dies, requests in flight end with RM542, and another one loads the same bundles;
    until it has, requests are refused with RM542. It dies with this process.
    """

    def __init__(
        self,
        limits: ServiceLimits,
        log: ServiceLog,
        *,
        device: str = "auto",
        threads: int | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__(limits)
        self._log = log
        self._settings = WorkerSettings(limits=limits, device=device, threads=threads, cache=cache)
        self._loop = asyncio.get_running_loop()
        self._worker: _Worker | None = None
        self._watching: asyncio.Task[None] | None = None  # ends after its worker has died
        self._supervisor: asyncio.Task[None] | None = None
        self._repair: asyncio.Task[None] | None = None  # loads what is lost
        self._changes = asyncio.Lock()  # one bundle is loaded or let go at a time
        self._paths: dict[str, str] = {}
        # What the worker calls a model: a bundle takes the place of another one of its name while
        # both are loaded.
        self._inner: dict[str, str] = {}
        self._numbers = itertools.count(1)
        self._deadline: float | None = None  # of requests, once this closes
        self._closed: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        bundles: Mapping[str, str],
        limits: ServiceLimits | None = None,
        *,
        log: ServiceLog | None = None,
        device: str = "auto",
        threads: int | None = None,
        cache: bool = True,
    ) -> Self:
        """Load bundles, by name, and return a service that is ready.

        Raises:
            ServiceError: One cannot be loaded.
        """
        service = cls(
            limits or ServiceLimits(),
            log or ServiceLog(sys.stderr),
            device=device,
            threads=threads,
            cache=cache,
        )
        try:
            await service._start_worker()
            for model, path in bundles.items():
                await service._put(path, model)
        except ServiceError as error:
            await service.close(0.0)
            if error.reason != "stopped":
                raise
            message, hint = error.problems[0].message, "What it printed last is in the log above."
            if signal.SIGKILL.name in message:
                hint += " Systems end processes so when memory runs out."
            raise ServiceError.of("stopped", "RM542", message, hint) from None
        except BaseException:
            await service.close(0.0)
            raise
        service.is_ready = True
        service._supervisor = asyncio.create_task(service._supervise())
        return service

    async def load(self, path: str, model: str) -> ModelInfo:
        """Load a bundle; one that has the name already answers until the new one is loaded.

        Raises:
            ServiceError: It cannot be loaded; what was loaded still is.
        """

        async def change() -> ModelInfo:
            self._demand_ready()
            async with self._changes:
                self._demand_ready()
                before = self._inner.get(model)
                info = await self._put(path, model)
                self._take_requests()
            if before is not None:
                await self._let_go(before)
            return info

        # Whoever asked may leave; a bundle that is loaded must be known to be.
        return await asyncio.shield(asyncio.create_task(change()))

    async def unload(self, model: str) -> None:
        """Let a system go; its requests end first, new ones are refused at once.

        Raises:
            ServiceError: There is none of that name.
        """

        async def change() -> None:
            async with self._changes:
                if model in self.lost:
                    self.lost.discard(model)
                    del self._paths[model]
                    return
                self._demand_model(model)
                self._demand_ready()
                del self.models[model], self._paths[model]
                inner = self._inner.pop(model)
            await self._let_go(inner)
            self._log.info("unloaded", model=model)

        await asyncio.shield(asyncio.create_task(change()))

    async def close(self, grace_s: float) -> None:
        """Take no more requests, wait so long for those that run, then stop them.

        Called again while it waits, it waits no longer than that call says.
        """
        self.is_ready = False
        deadline = self._loop.time() + grace_s
        self._deadline = min(deadline, self._deadline or deadline)
        if self._closed is None:
            self._closed = asyncio.create_task(self._close())
        await asyncio.shield(self._closed)

    async def _close(self) -> None:
        assert self._deadline is not None
        while self.num_open and self._loop.time() < self._deadline:
            await asyncio.sleep(0.02)
        for task in (self._supervisor, self._repair):
            if task is not None:
                task.cancel()
        if self.num_open:
            self._log.warning("requests cut", requests=self.num_open)
        self.fail_open(_stopped("the service ends"))
        if self._worker is not None:
            await self._worker.stop()
        if self._watching is not None:
            await self._watching

    def _demand_ready(self) -> None:
        has_none = bool(self.lost) and not self.models  # which a bundle may change
        if self._worker is None or not (self.is_ready or has_none) or self._deadline is not None:
            raise _stopped("the service starts or ends")

    async def _put(self, path: str, model: str) -> ModelInfo:
        """Load a bundle and let it answer under a name."""
        inner = f"{model}#{next(self._numbers)}"
        info = structs.replace(await self._load(str(Path(path).absolute()), inner), name=model)
        self.models[model], self._paths[model], self._inner[model] = info, path, inner
        self.lost.discard(model)
        self._log.info("loaded", model=model, path=path, ms=info.loads_ms)
        return info

    def _take_requests(self) -> None:
        """Take requests if there is something that answers them."""
        is_up = self._worker is not None and self._deadline is None
        self.is_ready = is_up and bool(self.models or not self.lost)

    async def _let_go(self, inner: str) -> None:
        try:
            await self._unload(inner)
        except ServiceError as error:
            if error.reason != "stopped":  # a worker that is gone has let go of everything
                raise

    def _send(self, request: AnyRequest) -> None:
        worker = self._worker
        if isinstance(request, Ask | Read):
            request = structs.replace(request, model=self._inner[request.model])
        try:
            if worker is None:
                raise _stopped("the worker process is started again")
            worker.writer.write(to_line(request))
        except (ServiceError, RecmasError) as error:
            if not isinstance(request, Cancel):
                self.dispatch(_failed(request.id, error))

    async def _start_worker(self) -> None:
        self._worker = worker = await _Worker.spawn(self._settings, self._log)
        self.worker_pid = worker.process.pid
        self._watching = asyncio.create_task(self._watch(worker))

    async def _watch(self, worker: _Worker) -> None:
        """Pass on what a worker says until it dies, and end the requests that it had."""
        listening = asyncio.create_task(self._listen(worker))
        await worker.pass_on(self.dispatch)
        listening.cancel()
        self._worker = self.gauges = self.worker_pid = None
        self.is_ready = False
        how = await worker.how_it_ended()
        if self._deadline is None:
            self._log.error("worker ended", how=how, requests=self.num_open)
        self.fail_open(_stopped(f"the worker process ended ({how})"))

    async def _listen(self, worker: _Worker) -> None:
        """End a worker that has something to do and says nothing for long."""
        silent = 0  # looks, not seconds: this process may have been held up itself
        while silent < _LISTENS:
            before = worker.num_events
            await asyncio.sleep(_SILENT_S / _LISTENS)
            silent = silent + 1 if self.num_open and worker.num_events == before else 0
        worker.kill(f"it said nothing for {_SILENT_S:g} s")

    async def _supervise(self) -> None:
        """Start a worker whenever one has died, later and later if they die at once."""
        delay_s = 0.0
        while True:
            began = self._loop.time()
            if self._watching is not None:
                await asyncio.shield(self._watching)
            if self._loop.time() - began > _SETTLED_S:
                delay_s = 0.0
            await asyncio.sleep(delay_s)
            delay_s = min(_MOST_DELAY_S, delay_s * 2 or _FIRST_DELAY_S)
            self.num_restarts += 1
            try:
                async with self._changes:
                    await self._start_worker()
                    await self._load_again()
                    self._take_requests()
            except ServiceError as error:  # it died
                self._log.error("worker not ready", reason=str(error))
            except OSError as error:  # no processes or files to be had: not for ever
                self._log.error("no worker process", reason=str(error))
                self._watching = None
            else:
                self._log.info("worker ready", pid=self.worker_pid, restarts=self.num_restarts)
                if self.lost and (self._repair is None or self._repair.done()):
                    self._repair = asyncio.create_task(self._load_lost())

    async def _load_again(self) -> None:
        """Load what was loaded; a bundle that is broken now is left out and reported."""
        self._inner.clear()
        for model in list(self._paths):
            if (reason := await self._try(model)) is not None:
                self._log.error(
                    "not loaded", model=model, path=self._paths[model], reason=str(reason)
                )

    async def _load_lost(self) -> None:
        """Load what is lost once it is whole again, however long that takes."""
        delay_s = _FIRST_DELAY_S
        while self.lost:
            await asyncio.sleep(delay_s)
            delay_s = min(_MOST_LOST_S, delay_s * 2)
            for model in sorted(self.lost):
                async with self._changes:
                    if self._worker is not None and model in self.lost:
                        with suppress(ServiceError):  # the worker died, and is started again
                            await self._try(model)
                            self._take_requests()

    async def _try(self, model: str) -> ServiceError | None:
        """Load a model's bundle again; return why that failed.

        Raises:
            ServiceError: The worker died.
        """
        try:
            await self._put(self._paths[model], model)
        except ServiceError as error:
            if error.reason == "stopped":
                raise
            self.models.pop(model, None)
            self.lost.add(model)
            return error
        return None


@dataclass
class _Worker:
    """A worker process and the channel to it.

    Attributes:
        num_events: Events that it has told.
        why: The service ended it.
    """

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    output: asyncio.Task[None]
    log: ServiceLog
    num_events: int = 0
    why: str | None = None

    @classmethod
    async def spawn(cls, settings: WorkerSettings, log: ServiceLog) -> Self:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # -P: a folder that the command happens to run in provides no modules. A session of
                # its own: Ctrl-C is for the front end, which lets requests end first.
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-u", "-m", _WORKER, str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        except BaseException:
            ours.close()
            raise
        assert process.stdout is not None
        output = asyncio.create_task(_log_lines(process.stdout, log))
        writer.write(to_line(settings))
        return cls(process=process, reader=reader, writer=writer, output=output, log=log)

    async def pass_on(self, dispatch: Callable[[AnyEvent | Gauges], None]) -> None:
        """Hand over events until the channel ends; one that holds nonsense is ended."""
        try:
            while True:
                event = EVENTS.decode(await self.reader.readuntil())
                self.num_events += 1
                dispatch(event)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it has ended
        except (asyncio.LimitOverrunError, msgspec.DecodeError) as error:
            self.log.error("worker says nonsense", reason=str(error))
            self.kill("it said nonsense")

    async def how_it_ended(self) -> str:
        """Wait for the end of the process, and say what ended it."""
        self.writer.close()
        try:
            # One that closed its channel and lives on is of no use.
            status = await asyncio.wait_for(self.process.wait(), _LAST_STEP_S)
        except TimeoutError:
            self.kill("it closed its channel and ran on")
            status = await self.process.wait()
        # What it printed last is logged first; but a program that it started may print for ever.
        await asyncio.wait({self.output}, timeout=1.0)
        self.output.cancel()
        if self.why is not None:
            return f"by the service: {self.why}"
        return f"status {status}" if status >= 0 else signal.Signals(-status).name

    async def stop(self) -> None:
        """Let it end after the step that runs, but not wait long."""
        self.writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), _LAST_STEP_S)
        except TimeoutError:
            self.kill("the service ends")
            await self.process.wait()

    def kill(self, why: str) -> None:
        """End it now."""
        self.why = why
        with suppress(ProcessLookupError):
            self.process.kill()


async def _log_lines(stream: asyncio.StreamReader, log: ServiceLog) -> None:
    """Log what a worker prints, line by line, however long a line is."""
    rest = b""
    while block := await stream.read(2**16):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            log.info("worker", output=cut(line.decode("utf-8", "replace")))
        rest = rest[: 2**16]
    if rest:
        log.info("worker", output=cut(rest.decode("utf-8", "replace")))


def _stopped(message: str) -> ServiceError:
    return ServiceError.of("stopped", "RM542", message, _HINT)


def _failed(request_id: int, error: ServiceError | RecmasError) -> Failed:
    if isinstance(error, ServiceError):
        return Failed(id=request_id, reason=error.reason, problems=error.problems)
    problems = tuple(map(ProblemInfo.of, error.problems))
    return Failed(id=request_id, reason="input", problems=problems)
