"""What is written down of a run: nothing twice, and every record in its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import recmas_runtime as rt
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter


def records(**questions: str) -> list[rt.Record]:
    return [rt.Record(id=name, fields={"question": q}) for name, q in questions.items()]


def trace_of(system: rt.System, asked: list[rt.Record], folder: Path) -> list[Any]:
    """Answer records and return the results; the trace lies in the folder."""
    with TraceWriter(folder) as trace:
        return system.run_batch(asked, trace=trace)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]


def steps_of(folder: Path) -> list[list[dict[str, Any]]]:
    return [[{**step, "ms": 0} for step in line["steps"]] for line in lines_of(folder)]


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
    assert steps_of(tmp_path / "over") == steps_of(tmp_path / "fit")


def batch(*places: int, value: float = 1) -> tuple[Any, ...]:
    asked = [rt.Record(id=place, fields={}, index=place - 1) for place in places]
    return asked, [], [{"a->b@1": np.full((2, 3), value + i)} for i, _ in enumerate(places)]


def test_a_folder_may_be_named_by_text(tmp_path: Path) -> None:
    with TraceWriter(str(tmp_path / "new")) as trace:
        trace.add_batch(*batch(1))
    assert len(lines_of(tmp_path / "new")) == 1


def test_each_record_has_a_file_named_after_its_place(tmp_path: Path) -> None:
    with TraceWriter(tmp_path) as trace:
        trace.add_batch(*batch(1, 3))
        trace.add_batch(*batch(1_000_000))
        # Written as they come, not at the end.
        assert len(lines_of(tmp_path)) == 3
    assert [(line["id"], line["file"], line["batch_size"]) for line in lines_of(tmp_path)] == [
        (1, "000001.npz", 2),
        (3, "000003.npz", 2),
        (1_000_000, "1000000.npz", 1),
    ]
    with np.load(tmp_path / "000003.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"a->b@1": [[2.0] * 3] * 2}


def test_a_trace_is_replaced_only_on_demand(tmp_path: Path) -> None:
    with TraceWriter(tmp_path) as trace:
        trace.add_batch(*batch(1, 2))
    (tmp_path / "000009.npz").write_bytes(b"not of a trace")
    with pytest.raises(rt.RecmasError, match=r"RM520.*trace.jsonl.*--force"):
        TraceWriter(tmp_path)
    with TraceWriter(tmp_path, resume=True) as trace:
        trace.add_batch(*batch(3))
    assert [line["id"] for line in lines_of(tmp_path)] == [1, 2, 3]
    with TraceWriter(tmp_path, force=True) as trace:
        trace.add_batch(*batch(2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000002.npz", "000009.npz", "trace.jsonl"]


def test_messages_that_no_lines_name_are_not_written_over(tmp_path: Path) -> None:
    messages = tmp_path / "000001.npz"
    messages.write_bytes(b"precious")
    with pytest.raises(rt.RecmasError, match=r"RM520.*000001.npz.*--force"):
        TraceWriter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [messages.name]
    assert messages.read_bytes() == b"precious"
    with TraceWriter(tmp_path, force=True) as trace:
        trace.add_batch(*batch(1))
    assert messages.read_bytes() != b"precious"


def test_two_runs_do_not_write_one_trace(tmp_path: Path) -> None:
    with TraceWriter(tmp_path) as trace:
        for options in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(rt.RecmasError, match=r"RM503.*another run writes here"):
                TraceWriter(tmp_path, **options)
        trace.add_batch(*batch(1))
        with pytest.raises(rt.RecmasError, match=r"RM503.*another run"):
            TraceWriter(tmp_path, force=True)
    assert [line["id"] for line in lines_of(tmp_path)] == [1]
    assert (tmp_path / "000001.npz").exists()
    TraceWriter(tmp_path, resume=True).close()


def test_a_trace_of_nothing_is_empty(tmp_path: Path) -> None:
    TraceWriter(tmp_path).close()
    assert (tmp_path / RECORDS_NAME).read_bytes() == b""
