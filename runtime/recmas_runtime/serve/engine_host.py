"""The engines' side of a service: requests in, events out, in one thread that computes."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from recmas_runtime.core.errors import Problem, RecmasError, fail, is_out_of_memory
from recmas_runtime.formats.manifest import MANIFEST_NAME
from recmas_runtime.formats.plan import (
    MAX_NEW_TOKENS,
    ThinkStep,
    agents_of,
    feedback_links,
)
from recmas_runtime.formats.plan import Step as PlanStep
from recmas_runtime.running.records import Record
from recmas_runtime.running.system import System, load
from recmas_runtime.scheduling.scheduler import Scheduler, Task, current_task
from recmas_runtime.serve.answer_trace import AnswerTrace
from recmas_runtime.serve.protocol import (
    AgentInfo,
    AnyEvent,
    AnyRequest,
    Ask,
    Cancel,
    Done,
    Failed,
    Gauges,
    LinkInfo,
    Load,
    Loaded,
    ModelInfo,
    Piece,
    ProblemInfo,
    Read,
    Step,
    TokenRead,
    Unload,
    Unloaded,
    WasRead,
)
from recmas_runtime.serve.service import ServiceLimits

# A text goes on after every part of a prompt, which is a twelfth of a second for SmolLM2.
_CHUNKS_PER_STEP: Final = 1
# How long a request may have to wait that comes while others wait for their tools.
_WAIT_S: Final = 0.02
_GAUGES_S: Final = 1.0

Emit = Callable[[AnyEvent | Gauges], None]


class EngineHost:
    """Loads bundles and runs requests; `emit` gets their events, in the thread of `run`.

    Requests begin in the order they come, as many as memory and the limits allow, and share engine
    calls from then on. On devices where they cannot share them they run one after another.
    """

    def __init__(
        self,
        emit: Emit,
        limits: ServiceLimits,
        *,
        device: str = "auto",
        threads: int | None = None,
        cache: bool = True,
    ) -> None:
        self._emit = emit
        self._limits = limits
        self._device = device
        self._threads = threads
        self._cache = cache
        self._inbox: queue.SimpleQueue[AnyRequest | _Opened | None] = queue.SimpleQueue()
        self._models: dict[str, _Model] = {}
        self._waiting: deque[_Waiting] = deque()
        self._running: dict[Task, Ask | Read] = {}
        self._leaving: list[Unload] = []
        self._stops = False
        self._num_loading = 0
        self._told_at = 0.0

    def submit(self, request: AnyRequest) -> None:
        """Take a request; from any thread."""
        self._inbox.put(request)

    def stop(self) -> None:
        """End `run` after the engine call that runs; from any thread."""
        self._stops = True
        self._inbox.put(None)

    def run(self) -> None:
        """Run requests until `stop`."""
        self._scheduler = scheduler = Scheduler(chunks_per_step=_CHUNKS_PER_STEP)
        try:
            while not self._stops:
                self._take_requests()
                self._admit()
                if self._running:
                    scheduler.run_once(_WAIT_S)
                self._end_tasks()
                self._tell_gauges()
        finally:
            scheduler.close(list(self._running))
            for model in self._models.values():
                model.system.close()

    def _take_requests(self) -> None:
        """Take what has come; wait for something where nothing is to be done."""
        is_idle = not (self._running or self._waiting)
        while True:
            try:
                # Whoever waits for a bundle is told once in a while that this is alive.
                request = self._inbox.get(is_idle, _GAUGES_S if self._num_loading else None)
            except queue.Empty:
                return
            is_idle = False
            match request:
                case None:
                    return
                case Ask() | Read():
                    self._waiting.append(_Waiting(request, time.perf_counter()))
                case Cancel():
                    self._cancel(request.id)
                case Load():
                    self._num_loading += 1
                    # Beside those that run: opening engines takes seconds.
                    threading.Thread(target=self._open, args=(request,), daemon=True).start()
                case _Opened():
                    self._take_model(request)
                case Unload():
                    self._leaving.append(request)
            self._let_models_go()

    def _admit(self) -> None:
        """Let those begin that waited longest, as long as there is room."""
        while self._waiting:
            waiting = self._waiting[0]
            model = self._models.get(waiting.request.model)
            if model is not None and not self._has_room(model):
                return
            self._waiting.popleft()
            if model is None:
                hint = "Load it first."
                name = waiting.request.model
                self._fail(
                    waiting.request,
                    fail("RM540", f"there is no model {name!r}", hint=hint).problems,
                )
                continue
            self._start(model, waiting)

    def _has_room(self, model: _Model) -> bool:
        if not self._running:
            return True  # one always fits, or says itself that it does not
        most = self._limits.max_batch or model.info.max_batch
        if len(self._running) >= (most if model.shares else 1):
            return False
        taken = sum(
            self._models[each.model].info.bytes_per_request for each in self._running.values()
        )
        room = self._limits.cache_bytes
        return room is None or taken + model.info.bytes_per_request <= room

    def _start(self, model: _Model, waiting: _Waiting) -> None:
        request = waiting.request
        queued_ms = round((time.perf_counter() - waiting.since) * 1e3, 3)

        def run() -> None:
            if isinstance(request, Ask):
                self._answer(request, model, queued_ms)
            else:
                self._read(request, model.shared)

        self._running[self._scheduler.start(run)] = request

    def _answer(self, ask: Ask, model: _Model, queued_ms: float) -> None:
        """Answer, in a task of its own."""
        system = model.shared
        # A run whose engine calls are not shared comes back between them, to be cancelled there.
        between: Callable[[], None] = _go_on if model.shares else self._scheduler.pause
        if ask.baseline != "latent":
            system = system.baseline(ask.baseline)
        if ask.rounds is not None:
            system = system.with_rounds(ask.rounds)
        rounds = system.plan.rounds

        def on_step(step: PlanStep) -> None:
            agents = agents_of(step)
            self._emit(Step(id=ask.id, op=step.op, round=step.round, rounds=rounds, agents=agents))
            between()

        trace = None if ask.thoughts is None else AnswerTrace(ask.thoughts)
        stream = system.stream(_record(ask), trace=trace, on_step=on_step, **_sampling(ask))
        for piece in stream:
            self._emit(Piece(id=ask.id, text=piece))
            between()
        assert stream.answer is not None, "the iteration has ended"
        task = current_task()
        self._emit(
            Done(
                id=ask.id,
                answer=stream.answer.to_json(),
                cached_tokens=0 if task is None else task.cached_positions,
                trace=None if trace is None else trace.told,
                queued_ms=queued_ms,
            )
        )

    def _read(self, read: Read, system: System) -> None:
        """Read a text, in a task of its own."""
        tokens = system.read_text(read.text, top=read.top)
        told = tuple(TokenRead(**vars(token)) for token in tokens)
        self._emit(WasRead(id=read.id, tokens=told))

    def _cancel(self, id_: int) -> None:
        self._waiting = deque(each for each in self._waiting if each.request.id != id_)
        for task in [task for task, request in self._running.items() if request.id == id_]:
            self._scheduler.cancel(task)
            del self._running[task]

    def _end_tasks(self) -> None:
        for task in [task for task in self._running if task.ended]:
            request = self._running.pop(task)
            if task.failure is not None:
                self._fail(request, _problems_of(task.failure))
        self._let_models_go()

    def _open(self, request: Load) -> None:
        start = time.perf_counter()
        try:
            opened: System | Exception = load(
                request.path, device=self._device, threads=self._threads, cache=self._cache
            )
        except Exception as error:  # whatever it is, it ends this one load
            opened = error
        self._inbox.put(_Opened(request, opened, (time.perf_counter() - start) * 1e3))

    def _take_model(self, opened: _Opened) -> None:
        self._num_loading -= 1
        request, system = opened.request, opened.system
        if isinstance(system, Exception):
            self._fail(request, _problems_of(system))
            return
        info = model_info(request.model, Path(request.path), system, opened.ms)
        shares = system.loaded.can_share
        shared = system
        if shares:
            limits = self._limits
            shared = system.shared(
                self._scheduler, chunk=limits.chunk, kept_bytes=limits.kept_bytes
            )
        self._models[request.model] = _Model(system, shared, info, shares)
        self._emit(Loaded(id=request.id, model=info))

    def _let_models_go(self) -> None:
        """Close the systems that are to go and that nobody uses any more."""
        in_use = {request.model for request in self._running.values()}
        in_use |= {waiting.request.model for waiting in self._waiting}
        for request in [each for each in self._leaving if each.model not in in_use]:
            self._leaving.remove(request)
            if (model := self._models.pop(request.model, None)) is not None:
                model.system.close()
            self._emit(Unloaded(id=request.id, model=request.model))

    def _tell_gauges(self) -> None:
        now = time.perf_counter()
        if self._running and now - self._told_at < _GAUGES_S:
            return
        self._told_at = now
        counts = self._scheduler.counts
        self._emit(
            Gauges(
                running=len(self._running),
                waiting=len(self._waiting),
                rows_per_step={str(rows): n for rows, n in sorted(counts.rows_per_step.items())},
                chunk_tokens=counts.chunk_positions,
                hit_tokens=counts.kept_positions,
                cache_bytes=sum(model.shared.loaded.cache_bytes for model in self._models.values()),
                kept_bytes=sum(model.shared.loaded.kept_bytes for model in self._models.values()),
                phase_ms={kind: s * 1e3 for kind, s in counts.seconds.items()},
            )
        )

    def _fail(self, request: AnyRequest, problems: Sequence[Problem]) -> None:
        is_theirs = {problem.code for problem in problems} <= _OF_INPUT
        self._emit(
            Failed(
                id=request.id,
                reason="input" if is_theirs else "failed",
                problems=tuple(_without_id(ProblemInfo.of(each), request) for each in problems),
            )
        )


@dataclass
class _Model:
    """A loaded system, and the same for runs that share its engines."""

    system: System
    shared: System
    info: ModelInfo
    shares: bool


@dataclass
class _Waiting:
    request: Ask | Read
    since: float


@dataclass
class _Opened:
    """What came of opening a bundle."""

    request: Load
    system: System | Exception
    ms: float


# What a request can be wrong about.
_OF_INPUT = frozenset({"RM206", "RM500", "RM501", "RM505", "RM506", "RM508", "RM543", "RM567"})


def _problems_of(error: BaseException) -> Sequence[Problem]:
    if isinstance(error, RecmasError):
        return error.problems
    if is_out_of_memory(error):
        return [Problem(code="RM507", message="memory runs out", hint="Lower --max-batch.")]
    message = f"internal error: {type(error).__name__}: {error}"
    return [Problem(code="RM507", message=message, hint="This is a bug in recmas; report it.")]


def _go_on() -> None:
    """Do nothing, where others have their turn at every engine call."""


# Of a record that was sent without one.
_NO_ID: Final = "1"


def _record(ask: Ask) -> Record:
    given = ask.record.get("id", _NO_ID)
    return Record(id=given, fields=ask.record, index=ask.index, turns=ask.turns)


def _without_id(problem: ProblemInfo, request: AnyRequest) -> ProblemInfo:
    """Leave out an id that whoever asked has never seen."""
    if not isinstance(request, Ask) or "id" in request.record:
        return problem
    record = f"record {_NO_ID!r}"
    message = problem.message.removeprefix(f"{record}: ")
    if message.startswith(f"{record} "):
        message = f"the {message.replace(f'{record} ', 'record ', 1)}"
    return structs.replace(problem, message=message)


def _sampling(ask: Ask) -> Any:
    return dict(ask.sampling)


def model_info(name: str, path: Path, system: System, ms: float) -> ModelInfo:
    """Return what a front end must know of a loaded system."""
    plan = system.plan
    feedback = feedback_links(plan)
    manifest = path / MANIFEST_NAME
    # Files keep their times when a folder is moved or copied with them; the folder does not.
    created = max(manifest.stat().st_mtime, path.stat().st_ctime)
    positions = system.manifest.max_positions_of(plan.agents[plan.answer_agent].backbone)
    thinking = {name for step in plan.steps if isinstance(step, ThinkStep) for name in step.agents}
    return ModelInfo(
        name=name,
        system=plan.name,
        rounds=plan.rounds,
        answer_agent=plan.answer_agent,
        agents=tuple(
            AgentInfo(
                name=agent,
                backbone=each.backbone,
                latent_steps=each.latent_steps if agent in thinking else 0,
            )
            for agent, each in plan.agents.items()
        ),
        links=tuple(
            LinkInfo(
                source=link.source,
                target=link.target,
                carries=link.carries,
                feedback=name in feedback,
            )
            for name, link in plan.links.items()
        ),
        fields=plan.fields,
        max_new_tokens=max(
            1,
            min(MAX_NEW_TOKENS, positions - plan.limits.max_prompt_tokens),
            plan.sampling.max_new_tokens,
        ),
        default_max_tokens=plan.sampling.max_new_tokens,
        max_batch=plan.limits.max_batch,
        bytes_per_request=sum(cache.bytes_per_sample for cache in plan.caches.values()),
        has_tools=plan.tools is not None,
        digest=hashlib.sha256(manifest.read_bytes()).hexdigest(),
        created=int(created),
        loads_ms=round(ms, 3),
        serve=plan.conversation,
    )
