"""Continuous batching: many runs at once, whose rows share engine calls.

Every run is ordinary code that calls engines, in a greenlet of its own. A call does not compute:
it is noted and the run pauses, until all runs have come to a call. Then the scheduler chooses
what computes next. Steps of one position, latent or text, of whichever runs, agents and rounds,
become one call of their backbone; prompts run in chunks between the steps. So runs begin and end
at any step, and what a run computes does not depend on which others there are.

One scheduler belongs to one thread.
"""

from __future__ import annotations

import contextvars
import queue
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import greenlet

from recmas_runtime.engines.interface import OutOfMemoryError

# Tools of different runs that wait at a time; they mostly wait for other processes.
_TOOL_THREADS: Final = 16


class SharedCalls(Protocol):
    """What computes the calls of one backbone."""

    def run_steps(self, calls: Sequence[Any]) -> list[Any]:
        """Run one position of all rows of all calls; returns what each gets."""

    def run_draft(self, call: Any) -> Any:
        """Run the position of a call's one row, and those that are drafted behind it."""

    def run_chunk(self, call: Any) -> Any:
        """Run a part of a prompt."""

    def run_heads(self, calls: Sequence[Any]) -> list[Any]:
        """Compute the logits that all calls ask for; returns what each gets."""

    def free_memory(self) -> None:
        """Let go of everything that is only kept for later."""


@dataclass(frozen=True, eq=False)
class Call:
    """An engine call that a run waits for; its kind says with which others it may run.

    Attributes:
        size: The number of its rows, or of its positions.
        work: What the engine is to compute.
    """

    engine: SharedCalls
    size: int
    work: Any


@dataclass(frozen=True, eq=False)
class StepCall(Call):
    """One position of some rows.

    Attributes:
        num_drafted: Positions behind that of its one row which may run with it. They do not where
            other rows wait: reading weights once for all rows gains more than a draft of one.
    """

    num_drafted: int = 0


@dataclass(frozen=True, eq=False)
class ChunkCall(Call):
    """A part of a prompt."""


@dataclass(frozen=True, eq=False)
class HeadCall(Call):
    """Logits of hidden states."""


class Task(greenlet.greenlet):
    """A run.

    Attributes:
        scheduler: Whose run it is.
        engine_s: Its share of all time so far: a call's time is divided among those it ran for.
        outside_s: Time that it waited for what computes elsewhere.
        cached_positions: Of its prompts, those that were taken from other runs.
    """

    def __init__(self, scheduler: Scheduler, function: Callable[[], Any]) -> None:
        super().__init__(function, scheduler.main)
        # Callbacks and tools of a run see the context that it was started in.
        self.gr_context = contextvars.copy_context()
        self.scheduler = scheduler
        self.engine_s = 0.0
        self.outside_s = 0.0
        self.cached_positions = 0
        self._future: Future[Any] = Future()

    @property
    def ended(self) -> bool:
        """Whether there is a result, an error, or neither because it was cancelled."""
        return self._future.done()

    @property
    def failure(self) -> BaseException | None:
        """What the run raised, once it has ended."""
        return self._future.exception()

    @property
    def result(self) -> Any:
        """What the run returned, once it has ended; raises what it raised."""
        return self._future.result()

    def clock(self) -> float:
        """Return its share of the time so far, in seconds, and what it has waited elsewhere."""
        return self.engine_s + self.outside_s


@dataclass
class Counts:
    """What a scheduler did so far.

    Attributes:
        rows_per_step: How many steps ran with how many rows.
        chunk_positions: Positions of prompts that ran.
        kept_positions: Positions of prompts that were there already.
        seconds: Time in calls, by kind.
    """

    rows_per_step: Counter[int] = field(default_factory=Counter)
    chunk_positions: int = 0
    kept_positions: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class Scheduler:
    """Runs tasks until each has ended; see the module.

    Args:
        chunks_per_step: Parts of prompts that may run before others take a step. Fewer keep texts
            flowing, more let more rows step together. None for all that there are.
    """

    def __init__(self, *, chunks_per_step: int | None = None) -> None:
        self.main = greenlet.getcurrent()
        self._chunks_per_step = chunks_per_step
        self._chunks_since_step = 0
        self.counts = Counts()
        self._resume: deque[tuple[Task, Any, BaseException | None]] = deque()
        self._heads: list[tuple[Task, HeadCall]] = []
        self._steps: list[tuple[Task, StepCall]] = []
        self._chunks: deque[tuple[Task, ChunkCall]] = deque()
        self._paused: list[Task] = []
        self._outside: set[Task] = set()
        self._came_back: queue.SimpleQueue[tuple[Task, Any, BaseException | None]] = (
            queue.SimpleQueue()
        )
        self._threads: ThreadPoolExecutor | None = None
        self._accounted = time.perf_counter()

    def start(self, function: Callable[[], Any]) -> Task:
        """Take a run on; it begins with the next `run_once`."""
        if not (self._resume or self.is_computing):
            self._accounted = time.perf_counter()
        task = Task(self, function)
        self._resume.append((task, None, None))
        return task

    def cancel(self, task: Task) -> None:
        """End a run where it is; what it holds is free at once."""
        if task.ended:
            return
        self._heads = [each for each in self._heads if each[0] is not task]
        self._steps = [each for each in self._steps if each[0] is not task]
        self._chunks = deque(each for each in self._chunks if each[0] is not task)
        self._resume = deque(each for each in self._resume if each[0] is not task)
        self._paused = [each for each in self._paused if each is not task]
        self._outside.discard(task)
        if task:  # has begun
            task.throw(greenlet.GreenletExit())
        if not task.ended:
            task._future.cancel()

    @property
    def is_computing(self) -> bool:
        """Whether a run waits for an engine."""
        return bool(self._heads or self._steps or self._chunks)

    @property
    def waits_outside(self) -> bool:
        """Whether runs wait for their tools and for nothing else."""
        others = self._resume or self._paused or self.is_computing
        return bool(self._outside) and not others

    def run_once(self, wait_s: float = 0.0) -> None:
        """Let every run go on to its next call, and run some of these calls.

        Args:
            wait_s: How long to wait for a tool where nothing else is to be done.
        """
        self._take_back(wait_s if self.waits_outside else 0.0)
        self._resume += [(task, None, None) for task in self._paused]
        self._paused.clear()
        while self._resume:
            task, value, error = self._resume.popleft()
            self._go_on(task, value, error)
        if self._chunk_is_next:
            self._chunks_since_step += 1
            # In the order they came: a prompt that is not through stands at the end again.
            chunk = self._chunks.popleft()
            self.counts.chunk_positions += chunk[1].size
            self._run_together("chunk", [chunk], lambda engine, calls: [engine.run_chunk(calls[0])])
        elif self._heads:
            # Before steps, so that texts and thoughts take their next one together.
            heads, self._heads = self._heads, []
            self._run_together("head", heads, lambda engine, calls: engine.run_heads(calls))
        elif self._steps:
            self._chunks_since_step = 0
            waiting, self._steps = self._steps, []
            drafts: list[tuple[Task, StepCall]] = []
            steps: list[tuple[Task, StepCall]] = []
            for group in by_engine(waiting):
                self.counts.rows_per_step[sum(call.size for _, call in group)] += 1
                is_draft = len(group) == 1 and group[0][1].num_drafted
                (drafts if is_draft else steps).extend(group)
            self._run_together("verify", drafts, lambda engine, calls: [engine.run_draft(calls[0])])
            self._run_together("step", steps, lambda engine, calls: engine.run_steps(calls))

    @property
    def _chunk_is_next(self) -> bool:
        most = self._chunks_per_step
        nothing_else = not (self._heads or self._steps)
        return bool(self._chunks) and (
            most is None or self._chunks_since_step < most or nothing_else
        )

    def close(self, tasks: Sequence[Task] = ()) -> None:
        """End the given runs, and the threads of tools."""
        for task in tasks:
            self.cancel(task)
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def in_thread(self, function: Callable[[], Any]) -> Any:
        """Run a function of a task that computes elsewhere; others go on meanwhile.

        Outside of tasks it is just called.
        """
        task = current_task()
        if task is None:
            return function()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_TOOL_THREADS, "tools")
        context = contextvars.copy_context()
        return self.wait_outside(self._threads.submit(context.run, function))

    def wait_outside(self, future: Future[Any]) -> Any:
        """Pause the current task until a future is done; returns what it has, or raises it.

        Outside of tasks it just waits. A task that is cancelled meanwhile cancels the future.
        """
        task = current_task()
        if task is None:
            return future.result()
        start = time.perf_counter()
        self._outside.add(task)
        future.add_done_callback(lambda done: self._came_back.put((task, *_outcome(done))))
        try:
            return self.main.switch(None)
        finally:
            future.cancel()
            task.outside_s += time.perf_counter() - start

    def pause(self) -> None:
        """Let the others go on, and whoever calls `run_once`, before the current task does."""
        task = current_task()
        if task is not None:
            self._paused.append(task)
            self.main.switch(None)

    def wait_for(self, call: Call) -> Any:
        """Pause the current task until a call has run; returns what it gave."""
        return self.main.switch(call)

    def _take_back(self, wait_s: float) -> None:
        """Let runs go on whose tools have ended."""
        while True:
            try:
                back = self._came_back.get(wait_s > 0, wait_s or None)
            except queue.Empty:
                return
            wait_s = 0.0
            if back[0] in self._outside:  # else it was cancelled
                self._outside.discard(back[0])
                self._resume.append(back)
                self._accounted = time.perf_counter()

    def _go_on(self, task: Task, value: Any, error: BaseException | None) -> None:
        """Resume a run with what its call gave, up to its next call or its end."""
        try:
            if error is not None:
                call = task.throw(error)
            elif task:
                call = task.switch(value)
            else:
                call = task.switch()  # begins: its function takes no argument
        except Exception as failure:
            task._future.set_exception(failure)
            return
        if task.dead:
            task._future.set_result(call)
            return
        match call:
            case HeadCall():
                self._heads.append((task, call))
            case StepCall():
                self._steps.append((task, call))
            case ChunkCall():
                self._chunks.append((task, call))

    def _run_together(
        self,
        kind: str,
        waiting: Sequence[tuple[Task, Call]],
        run: Callable[[SharedCalls, list[Any]], list[Any]],
    ) -> None:
        """Run calls of one kind, those of a backbone at once, and let their runs go on."""
        for group in by_engine(waiting):
            engine = group[0][1].engine
            calls = [call for _, call in group]
            size = sum(call.size for call in calls)
            start = time.perf_counter()
            try:
                try:
                    results = run(engine, calls)
                except OutOfMemoryError:
                    engine.free_memory()
                    results = run(engine, calls)
            except Exception as error:
                if len(group) > 1:  # one of them is at fault, and the others are not to pay
                    for one in group:
                        self._run_together(kind, [one], run)
                    continue
                self._resume.append((group[0][0], None, error))
            else:
                self._resume += [
                    (task, result, None) for (task, _), result in zip(group, results, strict=True)
                ]
            now = time.perf_counter()
            self.counts.seconds[kind] += now - start
            share = (now - self._accounted) / size
            for task, call in group:
                task.engine_s += share * call.size
            self._accounted = now


def by_engine(waiting: Sequence[tuple[Task, Any]]) -> list[list[tuple[Task, Any]]]:
    """Return calls in groups of one backbone."""
    groups: dict[int, list[tuple[Task, Any]]] = {}
    for task, call in waiting:
        groups.setdefault(id(call.engine), []).append((task, call))
    return list(groups.values())


def current_task() -> Task | None:
    """Return the run that the running code is a part of."""
    current = greenlet.getcurrent()
    return current if isinstance(current, Task) else None


def _outcome(done: Future[Any]) -> tuple[Any, BaseException | None]:
    if done.cancelled():
        return None, RuntimeError("the scheduler was closed")
    error = done.exception()
    return (None, error) if error is not None else (done.result(), None)
