"""While a tool of one run is at work, other runs use the same engines: all answer as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec import structs

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.specs import SPECS
from recmas_runtime.formats.plan import SamplingPlan, ToolsPlan
from recmas_runtime.tools import CallScanner, Toolbox, ToolCall
from recmas_runtime.tools.call_scanner import Passed

QUESTIONS = ["What is 7 * 8?", "Hm?", "Anna has three plans and an orange. Which one is best?", "x"]
CHARS_OF_A_CALL = 4


class _OftenScanner(CallScanner):
    """Takes every so many characters for a call: tiny random models write none."""

    num_chars = 0

    def push(self, text: str = "", *, ended: bool = False) -> Passed:
        self.num_chars += len(text)
        if self.num_chars < CHARS_OF_A_CALL:
            return Passed(text)
        self.num_chars = 0
        return Passed("", call_text=text, calls=(ToolCall("lookup", text),))


class OftenBox(Toolbox):
    def scanner(self) -> CallScanner:
        return _OftenScanner(self.names)


@pytest.fixture
def make_system(build_tiny: BuildTiny) -> Callable[[Callable[[str], str]], rt.System]:
    """Return what makes a system on one tiny bundle's engines around a tool."""
    built = build_tiny(SPECS[next(iter(SPECS))])
    plan = ToolsPlan(functions=("lookup",), max_calls=6, timeout_s=60.0)

    def make(lookup: Callable[[str], str]) -> rt.System:
        box = OftenBox(plan, corpus=None, functions={"lookup": lookup})
        return rt.System(built.system.plan, built.system.loaded, box)

    return make


def told(answer: rt.Answer) -> tuple[str, str, rt.Usage, int]:
    return answer.answer, answer.finish_reason, answer.usage, len(answer.tool_calls)


def hot(system: rt.System) -> SamplingPlan:
    """Sampling in which every token depends on all before it."""
    return structs.replace(system.plan.sampling, temperature=1.5, max_new_tokens=40)


def test_runs_that_take_turns(make_system: Callable[[Callable[[str], str]], rt.System]) -> None:
    alone_system = make_system(lambda text: f"found {text}")
    sampling = hot(alone_system)
    alone = [told(alone_system.run(question, sampling=sampling)) for question in QUESTIONS]
    batch_alone = [told(a) for a in alone_system.run(QUESTIONS[:3], sampling=sampling)]
    assert sum(row[-1] for row in alone) > 8, "few calls prove little"

    barrier = threading.Barrier(2)

    def lookup(text: str) -> str:
        try:  # whenever two tools are at work, so that runs change places in the middle
            barrier.wait(0.05)
        except threading.BrokenBarrierError:
            barrier.reset()
        return f"found {text}"

    system = make_system(lookup)
    with ThreadPoolExecutor(5) as pool:
        single = [pool.submit(system.run, q, sampling=sampling) for q in QUESTIONS]
        batch = pool.submit(system.run, QUESTIONS[:3], sampling=sampling)
        assert [told(future.result(120)) for future in single] == alone
        assert [told(answer) for answer in batch.result(120)] == batch_alone


def test_a_whole_run_within_a_tool_s_time(
    make_system: Callable[[Callable[[str], str]], rt.System],
) -> None:
    alone_system = make_system(lambda text: f"found {text}")
    sampling = hot(alone_system)
    alone = [told(alone_system.run(question, sampling=sampling)) for question in QUESTIONS]
    asked, others = threading.Event(), threading.Event()

    def waits(text: str) -> str:
        asked.set()
        assert others.wait(60)
        return f"found {text}"

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(make_system(waits).run, QUESTIONS[0], sampling=sampling)
        assert asked.wait(60)
        beside = [told(alone_system.run(question, sampling=sampling)) for question in QUESTIONS[1:]]
        assert not waiting.done()
        others.set()
        assert told(waiting.result(60)) == alone[0]
    assert beside == alone[1:]
