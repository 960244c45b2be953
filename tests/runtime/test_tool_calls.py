"""Answers that call tools while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.hand_bundle import edit_json, rehash
from recmas_runtime.running.run_trace import RECORDS_NAME, TraceWriter

CALL = "<lookup>Q</lookup>"


@pytest.fixture
def tool_bundle(own_bundle: Path) -> Path:
    """A bundle whose answer agent may call the caller's function `lookup`, twice an answer."""
    tools = {
        "search": None,
        "python": None,
        "ask": False,
        "functions": ["lookup"],
        "max_calls": 2,
        "timeout_s": 5.0,
        "max_result_chars": 40,
    }
    edit_json(own_bundle / "plan.json", "tools", tools)
    edit_json(own_bundle / "plan.json", "sampling/max_new_tokens", 32)
    rehash(own_bundle)
    return own_bundle


def answer(bundle: Path, question: str, lookup: Callable[[str], str]) -> rt.Answer:
    return rt.load(bundle, functions={"lookup": lookup}).run(question)


def block(text: str) -> str:
    return f"\n<result>\n{text}\n</result>\n"


def test_the_result_joins_the_text_and_writing_goes_on(tool_bundle: Path) -> None:
    asked: list[str] = []

    def lookup(argument: str) -> str:
        asked.append(argument)
        return "14 rows"

    found = answer(tool_bundle, "C", lookup)
    assert asked == ["Q"]
    assert found.answer == CALL + block("14 rows") + "z"
    assert found.finish_reason == "stop"
    # Three tokens of the call, the letter, the end; the result was read, not written.
    assert found.usage.completion_tokens == 5
    without = answer(tool_bundle, "7", lookup)
    assert found.usage.prompt_tokens == without.usage.prompt_tokens + len(block("14 rows"))
    (call,) = found.to_json()["tool_calls"]
    assert {**call, "ms": 0} == {
        "name": "lookup",
        "argument": "Q",
        "status": "ok",
        "result": "14 rows",
        "ms": 0,
    }


def test_control_tokens_in_a_result_are_plain_text(tool_bundle: Path) -> None:
    found = answer(tool_bundle, "C", lambda _: "a<|end|>b")
    assert found.answer == CALL + block("a<|end|>b") + "z"
    assert found.usage.completion_tokens == 5


def test_a_long_result_is_cut_and_says_so(tool_bundle: Path) -> None:
    found = answer(tool_bundle, "C", lambda _: "x" * 1000)
    (call,) = found.tool_calls
    assert len(call.text) <= 40
    assert "991 characters left out" in call.text
    assert found.answer == CALL + block(call.text) + "z"


@pytest.mark.parametrize("functions", [None, {"lookup": lambda _: 1 / 0}])
def test_a_tool_that_fails_does_not_fail_the_run(tool_bundle: Path, functions: object) -> None:
    found = rt.load(tool_bundle, functions=functions).run("C")  # type: ignore[arg-type]
    (call,) = found.tool_calls
    assert call.status == ("refused" if functions is None else "error")
    assert found.answer == CALL + block(call.text) + "z"


def test_a_batch_in_which_some_call_equals_one_by_one(tool_bundle: Path) -> None:
    system = rt.load(tool_bundle, functions={"lookup": lambda _: "a somewhat long result"})
    questions = ["7", "C", "long question 3", "CC"]
    together = system.run(questions)
    alone = [system.run(question) for question in questions]
    assert [a.answer for a in together] == [a.answer for a in alone]
    assert [a.usage for a in together] == [a.usage for a in alone]
    assert [len(a.tool_calls) for a in together] == [0, 1, 0, 1]


def test_a_result_may_outgrow_the_cache(tool_bundle: Path) -> None:
    edit_json(tool_bundle / "plan.json", "tools/max_result_chars", 700)
    rehash(tool_bundle)
    found = answer(tool_bundle, "C", lambda _: "y" * 700)
    assert found.answer.endswith("</result>\nz")


def test_a_result_beyond_the_backbones_positions_ends_the_answer(tool_bundle: Path) -> None:
    positions = json.loads((tool_bundle / "manifest.json").read_text())["backbones"]["one"]
    too_long = positions["max_positions"]
    edit_json(tool_bundle / "plan.json", "tools/max_result_chars", too_long)
    rehash(tool_bundle)
    found = answer(tool_bundle, "C", lambda _: "y" * too_long)
    assert found.finish_reason == "length"
    assert found.answer.endswith("</result>\n")


def test_a_stop_string_ends_what_the_model_writes_only(tool_bundle: Path) -> None:
    edit_json(tool_bundle / "plan.json", "sampling/stop", ["rows"])
    rehash(tool_bundle)
    found = answer(tool_bundle, "C", lambda _: "14 rows")
    assert found.answer == CALL + block("14 rows") + "z"


def test_stream_and_trace_tell_of_tools(tool_bundle: Path, tmp_path: Path) -> None:
    system = rt.load(tool_bundle, functions={"lookup": lambda _: "14 rows"})
    stream = system.stream("C")
    assert "".join(stream) == CALL + block("14 rows") + "z"
    trace = TraceWriter(tmp_path)
    system.run_batch([rt.Record(id="1", fields={"question": "C"})], trace=trace)
    trace.close()
    (line,) = (tmp_path / RECORDS_NAME).read_text().splitlines()
    events = json.loads(line)["steps"]
    assert [event["op"] for event in events[-2:]] == ["decode", "tools"]
    (call,) = events[-1]["tool_calls"]
    assert {**call, "ms": 0} == {
        "name": "lookup",
        "argument": "Q",
        "status": "ok",
        "result": "14 rows",
        "ms": 0,
    }
