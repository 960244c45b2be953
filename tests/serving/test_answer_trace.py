"""What an answer's trace tells is what a written trace holds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

import recmas_runtime as rt
from recmas_runtime.formats.plan import ThinkStep
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter
from recmas_runtime.serve.engine_host import model_info
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import Ask, Done
from recmas_runtime.serve.service import ServiceError


def done(bundle: Path, **settings: Any) -> Done:
    async def ask() -> Done:
        service = await LocalService.start({"system": str(bundle)}, threads=1)
        try:
            ask = Ask(id=0, model="system", record={"question": "4"}, **settings)
            *_, last = [event async for event in service.ask(ask)]
        finally:
            await service.close(0.0)
        assert isinstance(last, Done)
        return last

    return asyncio.run(ask())


def without_times(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**step, "ms": 0} for step in steps]


def test_it_is_that_of_a_written_trace(hand_bundle: Path, tmp_path: Path) -> None:
    with TraceWriter(tmp_path, thoughts=3) as writer:
        rt.load(hand_bundle, threads=1).run_batch(["4"], trace=writer)
    (line,) = (json.loads(text) for text in (tmp_path / RECORDS_NAME).read_text().splitlines())
    told = done(hand_bundle, thoughts=3).trace
    assert told is not None
    assert told.keys() == {"steps", "thoughts", "messages"}
    assert json.loads(json.dumps(told["thoughts"])) == line["thoughts"]
    assert json.loads(json.dumps(told["messages"])) == line["messages"]
    assert without_times(told["steps"]) == without_times(line["steps"])
    assert all(step["ms"] > 0 for step in told["steps"])


def test_steps_alone(hand_bundle: Path) -> None:
    told = done(hand_bundle, thoughts=0).trace
    assert told is not None
    assert not told["thoughts"]
    assert not told["messages"]
    assert told["steps"][-1]["op"] == "decode"


def test_texts_are_told(hand_bundle: Path) -> None:
    told = done(hand_bundle, thoughts=2, baseline="text").trace
    assert told is not None
    assert [step["texts"] for step in told["steps"] if step["op"] == "write"]


def test_agents_whose_thoughts_nobody_receives_take_none(hand_bundle: Path) -> None:
    """A bundle says how many there would be; the page shows who thinks."""
    system = rt.load(hand_bundle, threads=1)
    told = model_info("system", hand_bundle, system, 0.0)
    assert [(agent.name, agent.latent_steps) for agent in told.agents] == [
        ("planner", 2),
        ("solver", 2),
    ]
    steps = [step for step in system.plan.steps if getattr(step, "agents", ()) != ("solver",)]
    assert not [s for s in steps if isinstance(s, ThinkStep) and "solver" in s.agents]
    short = system.with_plan(structs.replace(system.plan, steps=tuple(steps)))
    told = model_info("system", hand_bundle, short, 0.0)
    assert [agent.latent_steps for agent in told.agents] == [2, 0]


def test_without_a_trace_nothing_is_told(hand_bundle: Path) -> None:
    assert done(hand_bundle).trace is None


def test_a_number_of_tokens_that_is_none(hand_bundle: Path) -> None:
    with pytest.raises(ServiceError, match="RM506") as raised:
        done(hand_bundle, thoughts=4097)
    assert raised.value.reason == "input"
