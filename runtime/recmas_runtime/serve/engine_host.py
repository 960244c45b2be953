"""The engines' side of a service: requests in, events out, in one thread that computes."""

from __future__ import annotations

import hashlib
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recmas_runtime.core.errors import Problem, RecmasError, is_out_of_memory
from recmas_runtime.formats.plan import Plan, SendStep, feedback_links
from recmas_runtime.formats.plan import Step as PlanStep
from recmas_runtime.running.records import Record
from recmas_runtime.running.system import System, load
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

Emit = Callable[[AnyEvent | Gauges], None]


class _CancelledError(Exception):
    """Ends the run of a request that nobody waits for."""


class EngineHost:
    """Loads bundles and runs requests; `emit` gets their events, in the thread of `run`."""

    def __init__(
        self,
        emit: Emit,
        limits: ServiceLimits,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        self._emit = emit
        self._limits = limits
        self._device = device
        self._threads = threads
        self._requests: queue.SimpleQueue[AnyRequest | None] = queue.SimpleQueue()
        self._systems: dict[str, System] = {}
        self._cancelled: set[int] = set()
        self._stops = False

    def submit(self, request: AnyRequest) -> None:
        """Take a request; from any thread."""
        if isinstance(request, Cancel):
            self._cancelled.add(request.id)
        else:
            self._requests.put(request)

    def stop(self) -> None:
        """End `run` after the step that runs; from any thread."""
        self._stops = True
        self._requests.put(None)

    def run(self) -> None:
        """Run requests until `stop`."""
        while (request := self._requests.get()) is not None and not self._stops:
            try:
                self._run(request)
            except _CancelledError:
                pass
            except RecmasError as error:
                self._fail(request, error.problems)
            except Exception as error:  # a bug of ours, or no memory: the service goes on
                self._fail(request, (_told(error),))
            self._cancelled.discard(request.id)

    def _run(self, request: AnyRequest) -> None:
        match request:
            case Ask():
                self._ask(request)
            case Read():
                read = self._systems[request.model].read_text(request.text, top=request.top)
                tokens = tuple(TokenRead(**vars(token)) for token in read)
                self._emit(WasRead(id=request.id, tokens=tokens))
            case Load():
                self._load(request)
            case Unload():
                self._systems.pop(request.model).close()
                self._emit(Unloaded(id=request.id, model=request.model))

    def _ask(self, ask: Ask) -> None:
        system = self._systems[ask.model]
        if ask.baseline != "latent":
            system = system.baseline(ask.baseline)
        if ask.rounds is not None:
            system = system.with_rounds(ask.rounds)

        def on_step(step: PlanStep) -> None:
            self._check(ask)
            self._emit(_step_event(ask, step, system.plan))

        stream = system.stream(_record(ask), on_step=on_step, **_sampling(ask))
        for piece in stream:
            self._check(ask)
            self._emit(Piece(id=ask.id, text=piece))
        assert stream.answer is not None, "the iteration has ended"
        self._emit(Done(id=ask.id, answer=stream.answer.to_json()))

    def _check(self, ask: Ask) -> None:
        if self._stops or ask.id in self._cancelled:
            raise _CancelledError

    def _load(self, request: Load) -> None:
        start = time.perf_counter()
        system = load(request.path, device=self._device, threads=self._threads)
        self._systems[request.model] = system
        ms = (time.perf_counter() - start) * 1e3
        info = _model_info(request.model, Path(request.path), system, ms)
        self._emit(Loaded(id=request.id, model=info))

    def _fail(self, request: AnyRequest, problems: tuple[Problem, ...] | list[Problem]) -> None:
        codes = {problem.code for problem in problems}
        is_theirs = codes <= _OF_INPUT
        self._emit(
            Failed(
                id=request.id,
                reason="input" if is_theirs else "failed",
                problems=tuple(map(ProblemInfo.of, problems)),
            )
        )


# What a request can be wrong about.
_OF_INPUT = frozenset({"RM206", "RM500", "RM501", "RM505", "RM506", "RM508", "RM543"})


def _told(error: Exception) -> Problem:
    if is_out_of_memory(error):
        return Problem(code="RM507", message="memory runs out", hint="Lower --max-batch.")
    return Problem(
        code="RM507",
        message=f"internal error: {type(error).__name__}: {error}",
        hint="This is a bug in recmas; report it.",
    )


def _record(ask: Ask) -> Record:
    given = ask.record.get("id", "1")
    return Record(id=given, fields=ask.record, index=ask.index, turns=ask.turns)


def _sampling(ask: Ask) -> Any:
    return dict(ask.sampling)


def _step_event(ask: Ask, step: PlanStep, plan: Plan) -> Step:
    agents: tuple[str, ...]
    match step:
        case SendStep():
            agents = (step.source, *step.targets)
        case _ if hasattr(step, "agents"):
            agents = step.agents
        case _:
            agents = (plan.answer_agent,)
    return Step(id=ask.id, op=step.op, round=step.round, rounds=plan.rounds, agents=agents)


def _model_info(name: str, path: Path, system: System, ms: float) -> ModelInfo:
    plan = system.plan
    feedback = feedback_links(plan)
    manifest = path / "manifest.json"
    backbone = system.manifest.backbones[plan.agents[plan.answer_agent].backbone]
    return ModelInfo(
        name=name,
        system=plan.name,
        rounds=plan.rounds,
        answer_agent=plan.answer_agent,
        agents=tuple(
            AgentInfo(name=agent, backbone=each.backbone, latent_steps=each.latent_steps)
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
            1, backbone.max_positions - plan.limits.max_prompt_tokens, plan.sampling.max_new_tokens
        ),
        default_max_tokens=plan.sampling.max_new_tokens,
        max_batch=plan.limits.max_batch,
        bytes_per_request=sum(cache.bytes_per_sample for cache in plan.caches.values()),
        has_tools=plan.tools is not None,
        digest=hashlib.sha256(manifest.read_bytes()).hexdigest(),
        created=int(manifest.stat().st_mtime),
        loads_ms=ms,
        serve=plan.conversation,
    )
