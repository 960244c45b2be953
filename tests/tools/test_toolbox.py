"""Bounds of calls, and what a call that cannot be done tells the model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recmas_runtime.formats.plan import PythonPlan, SearchPlan, ToolsPlan
from recmas_runtime.tools import Toolbox, ToolCall, find_sandbox
from recmas_runtime.tools.search import shortened


def functions_box(function: Callable[[str], str] | None, **bounds: float) -> Toolbox:
    plan = ToolsPlan(functions=("lookup",), **bounds)  # type: ignore[arg-type]
    return Toolbox(plan, corpus=None, functions={"lookup": function} if function else None)


def test_names_in_order() -> None:
    plan = ToolsPlan(
        search=SearchPlan(backend="tavily", corpus=None, top_k=1),
        python=PythonPlan(memory_mb=64),
        ask=True,
        functions=("b", "a"),
    )
    box = Toolbox(plan, corpus=None)
    assert box.names == ("search", "python", "ask", "b", "a")
    assert box.scanner().push("<a>1</a>").calls == (ToolCall("a", "1"),)


def test_a_function_of_the_caller() -> None:
    result = functions_box(str.upper).run(ToolCall("lookup", "abc"), num_earlier=0)
    assert (result.status, result.text, result.call) == ("ok", "ABC", ToolCall("lookup", "abc"))
    assert result.ms >= 0


def test_no_calls_over_the_limit() -> None:
    ran = []
    box = functions_box(lambda text: ran.append(text) or "x", max_calls=2)
    states = [box.run(ToolCall("lookup", "a"), num_earlier=n).status for n in range(4)]
    assert states == ["ok", "ok", "limit", "limit"]
    assert len(ran) == 2


def test_a_call_that_takes_too_long() -> None:
    release = threading.Event()
    box = functions_box(lambda _: str(release.wait()), timeout_s=0.05)
    result = box.run(ToolCall("lookup", "a"), num_earlier=0)
    release.set()
    assert (result.status, result.text) == ("timeout", "stopped: it took longer than 0.05 s")


def test_a_long_result_says_how_much_is_missing() -> None:
    box = functions_box(lambda _: "x" * 5000, max_result_chars=100)
    text = box.run(ToolCall("lookup", "a"), num_earlier=0).text
    kept = text.count("x")
    assert len(text) <= 100 + len("x")
    assert text == "x" * kept + f" [... {5000 - kept} characters left out]"


@pytest.mark.parametrize("length", [0, 99, 100, 101, 137, 999, 1000, 10_000])
def test_shortened(length: int) -> None:
    text = shortened("y" * length, 100)
    assert len(text) <= 100
    assert (text == "y" * length) == (length <= 100)


def exits(_: str) -> str:
    sys.exit(3)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda _: {}["k"], "KeyError: 'k'"),
        (lambda _: 3, "the function returned int, not text"),
        (lambda _: None, "the function returned NoneType, not text"),
        (exits, "SystemExit: 3"),
    ],
)
def test_a_function_that_fails(function: Callable[[str], str], text: str) -> None:
    result = functions_box(function).run(ToolCall("lookup", "a"), num_earlier=0)
    assert (result.status, result.text) == ("error", text)


def test_a_result_is_always_valid_text() -> None:
    result = functions_box(lambda _: "a\ud800b").run(ToolCall("lookup", ""), num_earlier=0)
    assert result.text == "a?b"


def test_a_declared_function_that_nobody_provides() -> None:
    result = functions_box(None).run(ToolCall("lookup", "a"), num_earlier=0)
    assert result.status == "refused"
    assert result.text == "the program that runs this system provides no function `lookup`"


def test_an_unknown_tool_and_a_malformed_call() -> None:
    box = functions_box(str.upper)
    unknown = box.run(ToolCall("browser", "a"), num_earlier=0)
    assert unknown.status == "error"
    assert unknown.text == "there is no tool `browser`; the tools are `lookup`"
    (call,) = box.scanner().push("<tool_call>{</tool_call>").calls
    malformed = box.run(call, num_earlier=0)
    assert malformed.status == "error"
    assert malformed.text.startswith("this is not valid JSON")


def test_ask() -> None:
    plan = ToolsPlan(ask=True, timeout_s=0.01)
    refused = Toolbox(plan, corpus=None).run(ToolCall("ask", "why?"), num_earlier=0)
    assert (refused.status, refused.text) == ("refused", "nobody is there to answer")

    def slow(question: str) -> str:
        threading.Event().wait(0.05)  # people may take longer than other tools
        return f"because of {question}"

    answered = Toolbox(plan, corpus=None, ask=slow).run(ToolCall("ask", "why?"), num_earlier=0)
    assert (answered.status, answered.text) == ("ok", "because of why?")


def test_one_question_to_a_human_at_a_time() -> None:
    inside = threading.Semaphore(1)

    def ask(_: str) -> str:
        assert inside.acquire(blocking=False), "two questions at once"
        threading.Event().wait(0.01)
        inside.release()
        return "yes"

    box = Toolbox(ToolsPlan(ask=True), corpus=None, ask=ask)
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda n: box.run(ToolCall("ask", str(n)), num_earlier=0), range(8))
    assert {result.status for result in results} == {"ok"}


def test_ctrl_c_of_a_human_ends_the_run() -> None:
    def ask(_: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Toolbox(ToolsPlan(ask=True), corpus=None, ask=ask).run(ToolCall("ask", ""), num_earlier=0)


def python_box(**bounds: float) -> Toolbox:
    return Toolbox(ToolsPlan(python=PythonPlan(memory_mb=256), **bounds), corpus=None)  # type: ignore[arg-type]


def test_without_a_sandbox_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    mark = tmp_path / "ran"
    result = python_box().run(
        ToolCall("python", f"open({str(mark)!r}, 'w').write('x')"), num_earlier=0
    )
    assert result.status == "refused"
    assert result.text == (
        "this machine has no sandbox, so the program was not run "
        "(`recmas doctor` tells what is missing)"
    )
    assert not mark.exists()


needs_sandbox = pytest.mark.skipif(find_sandbox() is None, reason="no sandbox on this machine")


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("print(6 * 7)", "ok", "42"),
        ("```python\nprint(6 * 7)\n```", "ok", "42"),
        ("x = 1", "ok", "(no output; print what you want to see)"),
        ("", "error", "the program is empty"),
        ("import sys; sys.exit(3)", "error", "the program ended with exit code 3"),
    ],
)
def test_python(code: str, status: str, text: str) -> None:
    result = python_box(timeout_s=30).run(ToolCall("python", code), num_earlier=0)
    assert (result.status, result.text) == (status, text)


@needs_sandbox
def test_a_program_that_takes_too_long() -> None:
    call = ToolCall("python", "print('begun', flush=True)\nwhile True: pass")
    result = python_box(timeout_s=2).run(call, num_earlier=0)
    assert result.status == "timeout"
    assert result.text == "begun\nstopped: it took longer than 2 s"


@needs_sandbox
def test_python_tells_the_model_what_went_wrong() -> None:
    result = python_box().run(ToolCall("python", "print(1)\nprint(1 / 0)"), num_earlier=0)
    assert result.status == "error"
    assert result.text.startswith("1\nTraceback")
    assert result.text.endswith("ZeroDivisionError: division by zero")
