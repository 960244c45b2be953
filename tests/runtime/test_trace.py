"""What is written down of a run: nothing twice, and every record in its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

import recmas_runtime as rt
from kit.files import read_messages
from recmas_runtime.running.run_trace import EVENTS_NAME, MESSAGES_NAME, TraceWriter


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
    limits = structs.replace(text.plan.limits, max_prompt_tokens=128)
    system = text.with_plan(structs.replace(text.plan, limits=limits))
    # After a "C" the planner writes 18 letters, which the solver's prompt has no room for.
    asked = records(good="7", long="x" * 100 + "C", other="8")
    good, long, other = trace_of(system, asked, tmp_path / "over")
    assert (good.answer, other.answer) == ("h", "i")
    assert isinstance(long, rt.RecmasError)
    assert "RM501" in str(long)
    trace_of(system, [asked[0], asked[2]], tmp_path / "fit")
    assert events_of(tmp_path / "over") == events_of(tmp_path / "fit")


def test_rows_stand_for_the_records_in_their_order(tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path)
    first, last, later = (np.full((n, 2, 3), n, np.float32) for n in (1, 2, 3))
    trace.add_messages({"a->b@1": first, "a->b@3": first}, records=["1"])
    trace.add_messages({"a->b@1": last, "a->b@2": last, "a->b@3": last}, records=["2", "\ud800"])
    trace.add_messages({"a->b@1": later, "b->a@1": later[:, :1]}, records=["x", "y", "z"])
    trace.close()
    with np.load(tmp_path / MESSAGES_NAME, allow_pickle=False) as arrays:
        assert arrays["records"].tolist() == ["1", "2", "\ud800", "x", "y", "z"]
    nothing = np.nan
    for name, expected in {
        "a->b@1": [1, 2, 2, 3, 3, 3],
        "a->b@2": [nothing, 2, 2, nothing, nothing, nothing],
        "a->b@3": [1, 2, 2, nothing, nothing, nothing],
        "b->a@1": [nothing, nothing, nothing, 3, 3, 3],
    }.items():
        np.testing.assert_array_equal(read_messages(tmp_path)[name][:, 0, 0], expected)


def test_a_trace_of_nothing_is_empty(tmp_path: Path) -> None:
    TraceWriter(tmp_path).close()
    with np.load(tmp_path / MESSAGES_NAME, allow_pickle=False) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"records": []}
