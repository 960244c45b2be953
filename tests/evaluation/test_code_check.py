"""Code: extraction needs nothing, verdicts need a sandbox."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recmas_compiler.evaluation.checks import code as code_check
from recmas_compiler.evaluation.checks.code import CodeCheck, extract_code
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.tools.sandbox import find_sandbox

TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
RIGHT = "def add(a, b):\n    return a + b"
STDIN = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}]
CALLS = [{"arguments": [[1, 2], 3], "result": [4, 5]}, {"arguments": [[], 3], "result": []}]


@pytest.fixture(scope="module")
def check() -> CodeCheck:
    if find_sandbox() is None:
        pytest.skip("this machine has no sandbox")
    return CodeCheck(timeout_s=10.0, memory_mb=512)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.", RIGHT),
        (f"```\n{RIGHT}\n```", RIGHT),
        (f"```py\n{RIGHT}\n```\nUse it so:\n```python\nprint(add(1, 2))\n```", RIGHT),
        (f"```bash\npip install x\n```\n```python\n{RIGHT}\n```", RIGHT),
        (f"```python\ndef add(a): pass\n```\nBetter:\n```python\n{RIGHT}\n```", RIGHT),
        (f"```python\n{RIGHT}", RIGHT),
        (RIGHT, RIGHT),
        ("    return a + b\n", "    return a + b"),
        ("I cannot write that.", None),
        ("forty", None),
        ("", None),
    ],
)
def test_extraction(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("code", "correct"),
    [
        (RIGHT, True),
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b:\n    return", False),
        ("def sum(a, b):\n    return a + b", False),
        (f"{RIGHT}\nraise SystemExit(0)", False),
        (f"{RIGHT}\nimport os\nos._exit(0)", False),
        (f"{RIGHT}\nprint('passed')", True),
        ("def add(a, b):\n    while True: pass", False),
        (f"{RIGHT}\nopen('/etc/hostname').read()", False),
    ],
)
def test_assertions(
    check: CodeCheck, ask: Callable[..., Question], code: str, correct: bool
) -> None:
    quick = CodeCheck(timeout_s=3.0, memory_mb=512)
    assert quick(f"```python\n{code}\n```", ask(tests=TESTS)).correct is correct


def test_completions_and_whole_functions(check: CodeCheck, ask: Callable[..., Question]) -> None:
    prompt = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n'
    tests = ["def check(f):\n    assert f(1, 2) == 3\n", "check(add)"]
    question = ask(tests=tests, prompt=prompt, entry_point="add")
    assert check("    return a + b", question).correct
    assert check("return a + b", question).correct
    assert check(f"```python\n{prompt}    return a + b\n```", question).correct
    assert check("```python\ndef add(a: List, b):\n    return a + b\n```", question).correct
    assert not check("    return a", question).correct


def test_programs_that_read_input(check: CodeCheck, ask: Callable[..., Question]) -> None:
    code = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    assert check(code, ask(inputs=STDIN)).correct
    assert not check(code.replace("+", "-"), ask(inputs=STDIN)).correct


def test_methods_of_a_class(check: CodeCheck, ask: Callable[..., Question]) -> None:
    code = (
        "```python\nclass Solution:\n    def shift(self, xs: List[int], by: int):\n"
        "        return [x + by for x in xs]\n```"
    )
    assert check(code, ask(calls=CALLS, function="shift")).correct
    assert not check(code.replace("+", "*"), ask(calls=CALLS, function="shift")).correct


def test_a_text_without_code_is_no_answer(check: CodeCheck, ask: Callable[..., Question]) -> None:
    assert check("I would use a loop.", ask(tests=TESTS)).extracted is None


def test_a_record_without_tests_is_refused(check: CodeCheck, ask: Callable[..., Question]) -> None:
    with pytest.raises(RecmasError, match="no unit tests"):
        check("", ask())


def test_refusal_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_check, "find_sandbox", lambda: None)
    with pytest.raises(RecmasError, match="RM602") as refused:
        CodeCheck(timeout_s=1.0, memory_mb=64)
    assert "doctor" in refused.value.problems[0].hint
