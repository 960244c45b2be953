"""Answers that call tools while they are written."""

from __future__ import annotations

import _thread
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec import structs
from tokenizers import AddedToken, Tokenizer

import recmas_runtime as rt
from kit.files import lines
from kit.hand_bundle import TAGS, edit_json, rehash
from recmas_runtime.cli.main import main
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


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def same(left: rt.Answer, right: rt.Answer) -> bool:
    """Whether two answers are equal but for the time they took."""
    return (left.answer, left.finish_reason, left.usage) == (
        right.answer,
        right.finish_reason,
        right.usage,
    )


def test_others_are_answered_while_a_tool_runs(tool_bundle: Path) -> None:
    edit_json(tool_bundle / "plan.json", "tools/timeout_s", 60.0)
    rehash(tool_bundle)
    questions = ["C", "7", "CC"]
    system = rt.load(tool_bundle, functions={"lookup": lambda _: "14 rows"})
    hot = structs.replace(system.plan.sampling, temperature=2.0, max_new_tokens=24)
    alone = system.run(questions)
    others_alone = [system.run(question, sampling=hot) for question in ("3", "C", "x")]
    asked, others = threading.Event(), threading.Event()
    is_first = threading.Event()

    def lookup(_: str) -> str:
        if not is_first.is_set():
            is_first.set()
            asked.set()
            assert others.wait(30)
        return "14 rows"

    system = rt.load(tool_bundle, functions={"lookup": lookup})
    found: list[rt.Answer] = []
    thread = in_thread(lambda: found.extend(system.run(questions)))
    assert asked.wait(30)
    # The first run is inside of its tool, with the caches of three rows half written.
    beside = [system.run(question, sampling=hot) for question in ("3", "C", "x")]
    assert thread.is_alive()
    others.set()
    thread.join(30)
    assert all(same(a, b) for a, b in zip(found, alone, strict=True))
    assert all(same(a, b) for a, b in zip(beside, others_alone, strict=True))


def test_many_callers_with_tools_are_answered_as_if_alone(tool_bundle: Path) -> None:
    def lookup(_: str) -> str:
        time.sleep(0.01)
        return "14 rows"

    system = rt.load(tool_bundle, functions={"lookup": lookup})
    questions = ["C", "7", "CC", "long question 3"] * 3
    alone = [system.run(question) for question in questions]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(system.run, questions))
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("tool", ["function", "ask"])
def test_a_tool_that_asks_its_own_system_is_refused(tool_bundle: Path, tool: str) -> None:
    edit_json(tool_bundle / "plan.json", "tools/max_result_chars", 400)
    if tool == "ask":  # the model still writes `lookup`, so the person is asked under that name
        edit_json(tool_bundle / "plan.json", "tools/ask", True)
    rehash(tool_bundle)
    inner: list[object] = []

    def asks_again(_: str) -> str:
        for again in (system, system.baseline("single")):
            try:
                inner.append(again.run("7"))
            except rt.RecmasError as error:
                inner.append(error.problems[0].code)
        return system.run("7").answer

    system = rt.load(tool_bundle, functions={"lookup": asks_again}, ask=asks_again)
    if tool == "ask":
        assert system._toolbox is not None
        system._toolbox._tools["lookup"] = system._toolbox._tools["ask"]
    found = system.run("C")
    assert inner == ["RM513", "RM513"]
    (call,) = found.tool_calls
    assert call.status == "error"
    assert "error[RM513]" in call.text
    assert "one of its own tools" in call.text
    # Nothing is left locked, in this thread or another.
    assert system.run("7").answer == "h"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(system.run, "7").result(30).answer == "h"


def test_a_tool_may_ask_another_system(tool_bundle: Path) -> None:
    other = rt.load(tool_bundle)
    found = answer(tool_bundle, "C", lambda _: other.run("7").answer)
    assert found.answer == CALL + block("h") + "z"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_whatever_a_function_raises_is_that_record_s(
    tool_bundle: Path, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(_: str) -> str:
        raise error("no")

    system = rt.load(tool_bundle, functions={"lookup": fails})
    found = system.run(["C", "7"])
    assert [a.finish_reason for a in found] == ["stop", "stop"]
    assert found[0].tool_calls[0].status == "error"
    assert found[0].tool_calls[0].text == f"{error.__name__}: no"
    assert found[1].answer == "h"
    assert capfd.readouterr().err == ""


def test_an_interrupt_of_the_one_who_waits_leaves_the_system_usable(tool_bundle: Path) -> None:
    def lookup(_: str) -> str:
        if interrupts:
            interrupts.pop()
            _thread.interrupt_main()
            time.sleep(0.5)
        return "14 rows"

    interrupts = [True]
    system = rt.load(tool_bundle, functions={"lookup": lookup})
    with pytest.raises(KeyboardInterrupt):
        system.run("C")
    assert system.run("C").answer == CALL + block("14 rows") + "z"


@pytest.mark.parametrize("special", [False, True])
def test_tags_that_are_special_tokens(tool_bundle: Path, special: bool) -> None:
    path = tool_bundle / "backbones/one/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    if special:
        tokenizer.add_special_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.save(str(path))
    rehash(tool_bundle)
    found = answer(tool_bundle, "C", lambda _: "14 rows")
    assert found.answer == CALL + block("14 rows") + "z"
    # In a result they are text.
    found = answer(tool_bundle, "C", lambda _: "<lookup>Q</lookup>")
    assert found.answer == CALL + block("<lookup>Q</lookup>") + "z"
    assert len(found.tool_calls) == 1


@pytest.mark.parametrize("mark", ["</result >", "</RESULT>", "</ result\n>", "< /Result>"])
def test_a_result_cannot_end_its_block(tool_bundle: Path, mark: str) -> None:
    found = answer(tool_bundle, "C", lambda _: f"a{mark}b")
    assert found.answer == CALL + block(f"a&lt;{mark[1:]}b") + "z"


def test_a_report_knows_answers_with_calls(
    tool_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens of results are counted in the answer and in no step of its trace."""
    system = rt.load(tool_bundle, functions={"lookup": lambda _: "14 rows"})
    with TraceWriter(tmp_path) as trace:
        called, other = system.run_batch(["C", "7"], trace=trace)
    assert isinstance(called, rt.Answer)
    assert isinstance(other, rt.Answer)
    assert called.tool_calls
    answers = tmp_path / "a.jsonl"
    answers.write_text(lines(called.to_json(), other.to_json()))
    out = str(tmp_path / "r.html")
    assert main(["report", str(tmp_path), "-o", out, "--answers", str(answers)]) == 0
    assert capsys.readouterr().err == ""
