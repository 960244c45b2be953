"""Runs that share engines: what is theirs alone, and what becomes of those that fail or leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recmas_runtime as rt
from recmas_runtime.core.errors import fail
from recmas_runtime.engines.interface import OutOfMemoryError
from recmas_runtime.running.many import run_many
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.scheduling.kept_prompts import BLOCK, KeptBlock, KeptPrompts, block_keys
from recmas_runtime.scheduling.scheduler import ChunkCall, HeadCall, Scheduler, StepCall, Task

Records = Sequence[dict[str, str]]


@dataclass
class Doubling:
    """Calls whose results are twice what they are for; some fail."""

    ran: list[tuple[str, list[Any]]] = field(default_factory=list)
    failing: Callable[[list[Any]], Exception | None] = lambda works: None
    num_freed: int = 0

    def _run(self, kind: str, calls: Sequence[Any]) -> list[Any]:
        works = [call.work for call in calls]
        self.ran.append((kind, works))
        if (error := self.failing(works)) is not None:
            raise error
        return [2 * work for work in works]

    def run_steps(self, calls: Sequence[Any]) -> list[Any]:
        return self._run("step", calls)

    def run_draft(self, call: Any) -> Any:
        return self._run("draft", [call])[0]

    def run_chunk(self, call: Any) -> Any:
        return self._run("chunk", [call])[0]

    def run_heads(self, calls: Sequence[Any]) -> list[Any]:
        return self._run("head", calls)

    def free_memory(self) -> None:
        self.num_freed += 1


def run_all(scheduler: Scheduler, tasks: Sequence[Task]) -> None:
    deadline = time.monotonic() + 20
    while not all(task.ended for task in tasks):
        assert time.monotonic() < deadline, "the scheduler does not come to an end"
        scheduler.run_once(0.05)


def text_of(scheduler: Scheduler, engine: Doubling, prompt: int, steps: int) -> Callable[[], int]:
    """A run of some chunks, then steps with a head before each."""

    def run() -> int:
        for part in range(prompt):
            scheduler.wait_for(ChunkCall(engine, 8, part))
        total = 0
        for step in range(steps):
            total += scheduler.wait_for(HeadCall(engine, 1, step))
            total += scheduler.wait_for(StepCall(engine, 1, step))
        return total

    return run


def test_steps_of_all_runs_share_a_call() -> None:
    scheduler, engine = Scheduler(), Doubling()
    tasks = [scheduler.start(text_of(scheduler, engine, 2, steps)) for steps in (1, 3, 3)]
    run_all(scheduler, tasks)
    assert [task.result for task in tasks] == [0, 12, 12]
    # All prompts first, in turn; then heads and steps, each of as many runs as are left.
    assert [kind for kind, _ in engine.ran] == ["chunk"] * 6 + ["head", "step"] * 3
    assert [works for kind, works in engine.ran if kind == "chunk"] == [[0]] * 3 + [[1]] * 3
    assert [len(works) for kind, works in engine.ran if kind == "step"] == [3, 2, 2]
    assert dict(scheduler.counts.rows_per_step) == {3: 1, 2: 2}
    assert scheduler.counts.chunk_positions == 48
    assert sum(task.engine_s for task in tasks) >= sum(scheduler.counts.seconds.values())


def test_a_text_goes_on_beside_a_long_prompt() -> None:
    scheduler, engine = Scheduler(chunks_per_step=2), Doubling()
    writer = scheduler.start(text_of(scheduler, engine, 0, 4))
    reader = scheduler.start(text_of(scheduler, engine, 20, 0))
    run_all(scheduler, [writer])
    chunks = sum(kind == "chunk" for kind, _ in engine.ran)
    assert 8 <= chunks <= 9, "two before each of four steps, and one as the text ends"
    run_all(scheduler, [reader])


def test_a_draft_runs_where_no_other_row_waits() -> None:
    scheduler, engine, other = Scheduler(), Doubling(), Doubling()

    def text(where: Doubling, steps: int) -> Callable[[], int]:
        def run() -> int:
            call = StepCall(where, 1, 3, num_drafted=2)
            return sum(scheduler.wait_for(call) for _ in range(steps))

        return run

    tasks = [scheduler.start(text(engine, steps)) for steps in (1, 3)]
    tasks.append(scheduler.start(text(other, 2)))
    run_all(scheduler, tasks)
    assert [task.result for task in tasks] == [6, 18, 12]
    assert [kind for kind, _ in engine.ran] == ["step", "draft", "draft"]
    assert [kind for kind, _ in other.ran] == ["draft", "draft"], (
        "its rows share no call with these"
    )
    assert dict(scheduler.counts.rows_per_step) == {2: 1, 1: 4}
    assert scheduler.counts.seconds["verify"] > 0


def test_a_run_that_fails_costs_no_other() -> None:
    scheduler = Scheduler()
    engine = Doubling(failing=lambda works: ValueError("seven") if 7 in works else None)
    tasks = [
        scheduler.start(lambda work=work: scheduler.wait_for(StepCall(engine, 1, work)))
        for work in (1, 7, 3)
    ]
    run_all(scheduler, tasks)
    assert [task.failure is None for task in tasks] == [True, False, True]
    assert [tasks[0].result, tasks[2].result] == [2, 6]
    with pytest.raises(ValueError, match="seven"):
        _ = tasks[1].result


def test_memory_that_runs_out_is_freed_first() -> None:
    scheduler = Scheduler()
    engine = Doubling()
    engine.failing = lambda works: None if engine.num_freed else OutOfMemoryError("no room")
    tasks = [scheduler.start(lambda: scheduler.wait_for(StepCall(engine, 1, 4))) for _ in range(3)]
    run_all(scheduler, tasks)
    assert [task.result for task in tasks] == [8, 8, 8]
    assert engine.num_freed == 1


def test_a_cancelled_run_ends_where_it_is() -> None:
    scheduler, engine = Scheduler(), Doubling()
    ended: list[str] = []

    def run() -> None:
        try:
            while True:
                scheduler.wait_for(StepCall(engine, 1, 1))
        finally:
            ended.append("it let go of what it held")

    endless = scheduler.start(run)
    other = scheduler.start(text_of(scheduler, engine, 0, 5))
    never = scheduler.start(run)
    scheduler.cancel(never)
    scheduler.run_once()
    scheduler.run_once()
    scheduler.cancel(endless)
    assert ended == ["it let go of what it held"]
    run_all(scheduler, [other])
    assert other.result == 40
    assert endless.ended
    assert never.ended
    scheduler.cancel(endless)  # once more does nothing


def test_a_run_that_pauses_can_be_cancelled() -> None:
    scheduler = Scheduler()
    turns: list[int] = []

    def run() -> None:
        while True:
            turns.append(len(turns))
            scheduler.pause()

    task = scheduler.start(run)
    for _ in range(3):
        scheduler.run_once()
    assert turns == [0, 1, 2], "one turn each time"
    scheduler.cancel(task)
    scheduler.run_once()
    assert turns == [0, 1, 2]
    assert task.ended


def test_tools_of_several_runs_wait_beside_each_other() -> None:
    scheduler, engine = Scheduler(), Doubling()
    all_there = threading.Barrier(3, timeout=20)

    def run() -> int:
        arrived = scheduler.in_thread(all_there.wait)
        assert arrived in (0, 1, 2)
        step: int = scheduler.wait_for(StepCall(engine, 1, 5))
        return step

    tasks = [scheduler.start(run) for _ in range(3)]
    run_all(scheduler, tasks)
    assert [task.result for task in tasks] == [10, 10, 10]
    scheduler.close()


def test_results_come_in_order_and_failures_in_their_places() -> None:
    scheduler, engine = Scheduler(), Doubling()
    wrong = fail("RM500", "no question", hint="")

    def run_of(steps: int) -> Callable[[], Any]:
        return text_of(scheduler, engine, 0, steps)

    def broken() -> Any:
        raise fail("RM507", "the engine failed", hint="")

    runs: list[Any] = [run_of(9), wrong, run_of(1), broken, run_of(2)]
    found: list[Any] = list(
        run_many(runs, scheduler, lock=EngineLock(), at_once=2, free_memory=lambda: None)
    )
    assert [found[0], found[2], found[4]] == [144, 0, 4]
    assert [found[1].problems[0].code, found[3].problems[0].code] == ["RM500", "RM507"]
    assert max(scheduler.counts.rows_per_step) == 2


def test_without_memory_fewer_run_at_once() -> None:
    scheduler = Scheduler()
    engine = Doubling(failing=lambda works: OutOfMemoryError("full") if len(works) > 2 else None)
    running = [0]

    def run() -> int:
        running[0] += 1
        try:
            if running[0] > 2:
                raise OutOfMemoryError("no room for a third")
            result: int = scheduler.wait_for(StepCall(engine, 1, 3))
            return result
        finally:
            running[0] -= 1

    freed: list[int] = []
    found: Any = list(
        run_many(
            [run] * 6, scheduler, lock=EngineLock(), at_once=6, free_memory=lambda: freed.append(1)
        )
    )
    assert found == [6] * 6
    assert freed


def test_kept_blocks_are_found_by_all_inputs_before_them() -> None:
    rng = np.random.default_rng(0)
    prompt = rng.standard_normal((3 * BLOCK + 5, 4)).astype(np.float32)
    other = prompt.copy()
    other[BLOCK + 1, 2] += 1e-6
    keys, others = list(block_keys(prompt)), list(block_keys(other))
    assert len(keys) == 3
    assert keys[0] == others[0]
    assert keys[1] != others[1]
    assert keys[2] != others[2]
    # The last position always runs, so a prompt of whole blocks does not keep its last one.
    assert len(list(block_keys(prompt[: 2 * BLOCK]))) == 1

    def block(number: int) -> KeptBlock:
        rows = [np.full((1, 2, BLOCK, 3), number, np.float32)]
        return KeptBlock(rows=rows, hidden=np.zeros((BLOCK, 4), np.float32))

    kept = KeptPrompts(3 * block(0).num_bytes)
    for number, key in enumerate(keys):
        kept.keep(key, block(number))
    assert [int(b.rows[0][0, 0, 0, 0]) for b in kept.beginning(keys)] == [0, 1, 2]
    assert len(kept.beginning(others)) == 1
    kept.keep(others[1], block(9))  # one too many: the end of the first prompt goes
    assert len(kept.beginning(keys)) == 2
    assert kept.num_bytes == 3 * block(0).num_bytes
    kept.clear()
    assert kept.beginning(keys) == []


def test_fewer_rounds_of_a_built_plan(hand_bundle: Path) -> None:
    with rt.load(hand_bundle) as system:
        assert system.plan.rounds == 2
        one = system.with_rounds(1)
        answer = one.run("7")
        assert answer.rounds == 1
        assert answer.usage.latent_steps < system.run("7").usage.latent_steps
        assert system.with_rounds(2).plan == system.plan
        for rounds in (0, 3):
            with pytest.raises(rt.RecmasError, match="rounds is") as caught:
                system.with_rounds(rounds)
            assert caught.value.problems[0].code == "RM506"


def test_a_systems_records_are_answered_as_alone(hand_bundle: Path) -> None:
    with rt.load(hand_bundle) as system:
        questions = [str(n % 8) * (1 + n % 5) for n in range(20)]
        alone = [system.run(question).answer for question in questions]
        together = [
            answer.answer if isinstance(answer, rt.Answer) else answer
            for answer in system.answer_all(questions, at_once=7)
        ]
        assert together == alone
        mixed = list(system.answer_all(["1", {"x": 1}, "2"]))
        assert isinstance(mixed[1], rt.RecmasError)
        assert [a.answer for a in mixed if isinstance(a, rt.Answer)] == ["b", "c"]
