"""What is written down of a run: nothing twice, and every record in its row."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import recmas_runtime as rt
from recmas_runtime.trace import EVENTS_NAME, TraceWriter


def records(**questions: str) -> list[rt.Record]:
    return [rt.Record(id=name, fields={"question": q}) for name, q in questions.items()]


def trace_of(system: rt.System, asked: list[rt.Record], folder: Path) -> list[Any]:
    """Answer records and return the results; the trace lies in the folder."""
    trace = TraceWriter(folder)
    results = system.run_batch(asked, trace=trace)
    trace.close()
    return results


def events_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / EVENTS_NAME).read_text().splitlines()
    return [{**json.loads(line), "ms": 0} for line in lines]


def test_rounds_that_start_over_are_traced_once(hand_bundle: Path, tmp_path: Path) -> None:
    text = rt.load(hand_bundle).baseline("text")
    limits = replace(text.plan.limits, max_prompt_tokens=128)
    system = text.with_plan(replace(text.plan, limits=limits))
    # After a "C" the planner writes 18 letters, which the solver's prompt has no room for.
    asked = records(good="7", long="x" * 100 + "C", other="8")
    good, long, other = trace_of(system, asked, tmp_path / "over")
    assert (good.answer, other.answer) == ("h", "i")
    assert isinstance(long, rt.RecmasError)
    assert "RM501" in str(long)
    trace_of(system, [asked[0], asked[2]], tmp_path / "fit")
    assert events_of(tmp_path / "over") == events_of(tmp_path / "fit")
