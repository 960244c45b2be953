"""Code: extraction needs nothing, verdicts need a sandbox."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recmas_compiler.evaluation.checks import code as code_check
from recmas_compiler.evaluation.checks.code import CodeCheck, equal_output, extract_code
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


PROMPT = 'from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    """Add."""\n'
ASKED = ["def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\n", "check(add)"]

# Texts that hold a right answer, in forms that models write.
RIGHT_TEXTS = {
    "tests_behind_it": f"```python\n{RIGHT}\n```\nA test:\n```python\ndef test_add():\n"
    "    assert add(1, 2) == 3\n\n\ntest_add()\n```",
    "unittest_behind_it": f"```python\n{RIGHT}\n```\n```python\nimport unittest\n\n\n"
    "class TestAdd(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 2), 3)"
    "\n\n\nunittest.main()\n```",
    "list_item": "1. So:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n"
    "2. It adds.",
    "fence_is_the_item": "- ```python\n  def add(a, b):\n      return a + b\n  ```",
    "quoted": "> ```python\n> def add(a, b):\n>     return a + b\n> ```",
    "indented_with_tabs": "\t```python\n\tdef add(a, b):\n\t    return a + b\n\t```",
    "future_import": f"```python\nfrom __future__ import annotations\n\n{RIGHT}\n```",
    "docstring_and_future": f'```python\n"""Adds."""\nfrom __future__ import annotations\n'
    f"{RIGHT}\n```",
    "main_block": f"```python\n{RIGHT}\n\n\nif __name__ == '__main__':\n"
    "    print(add(1, int(input())))\n```",
    "helper_in_a_block_before": "```python\ndef plus(x, y):\n    return x + y\n```\n```python\n"
    "def add(a, b):\n    return plus(a, b)\n```",
    "import_in_a_block_before": "```python\nimport operator\n```\n```python\ndef add(a, b):\n"
    "    return operator.add(a, b)\n```",
    "usage_without_def": f"```python\n{RIGHT}\n```\n```python\nprint(add(1, 2))\n```",
    "console_block_behind": f"```python\n{RIGHT}\n```\n```console\n$ python add.py\n3\n```",
    "session_behind": f"```python\n{RIGHT}\n```\n```python\n>>> add(1, 2)\n3\n```",
    "unclosed": f"So:\n```python\n{RIGHT}",
    "tildes": f"~~~python\n{RIGHT}\n~~~",
    "language_python_3": f"```Python 3\n{RIGHT}\n```",
    "fence_of_four": f'````python\n{RIGHT[:14]}\n    """```"""\n{RIGHT[14:]}\n````',
    "better_one_last": f"```python\ndef add(a, b):\n    return a\n```\n```python\n{RIGHT}\n```",
    "better_one_cut_off": f"```python\n{RIGHT}\n```\n```python\ndef add(a, b):\n    return (",
    "class_and_function": "```python\nclass Adder:\n    def run(self, a, b):\n        return a+b\n"
    "def add(a, b):\n    return Adder().run(a, b)\n```",
    "lambda": "```python\nadd = lambda a, b: a + b\n```",
    "body": "```python\n    return a + b\n```",
    "prompts_import": "```python\ndef add(a: int, b: int) -> List:\n    return a + b\n```",
    "tests_before_it": f"```python\ndef test():\n    assert add(1, 2) == 3\n```\n"
    f"```python\n{RIGHT}\n```",
    "fence_behind_the_last_line": f"So:\n```python\n{RIGHT}```\nIt adds.",
    "fence_in_a_docstring": "```python\ndef add(a, b):\n    '''Adds.\n\n    ```\n    add(1, 2)\n"
    "    ```\n    '''\n    return a + b\n```",
    "among_prose": f"Here is the function:\n\n{RIGHT}\n\nIt adds.",
    "in_answer_marks": f"<answer>\n{RIGHT}\n</answer>",
    "line_ends_of_windows": f"```python\n{RIGHT}\n```".replace("\n", "\r\n"),
    "dataclass": "```python\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Pair:\n"
    "    a: int\n    b: int\n\n\ndef add(a, b):\n    return Pair(a, b).a + b\n```",
    "after_thinking": f"<think>\n```python\ndef add(a, b):\n    pass\n```\n</think>\n"
    f"```python\n{RIGHT}\n```",
    "prints_bytes": f"```python\nimport sys\nsys.stdout.buffer.write(b'x')\n{RIGHT}\n```",
    "recursion": "```python\ndef add(a, b):\n    return b if a == 0 else add(a-1, b+1) if a > 0 "
    "else add(a + 1, b - 1)\n```",
}


@pytest.mark.parametrize("name", RIGHT_TEXTS)
def test_right_answers_in_many_forms(
    check: CodeCheck, ask: Callable[..., Question], name: str
) -> None:
    question = ask(tests=ASKED, prompt=PROMPT, entry_point="add")
    assert check(RIGHT_TEXTS[name], question).correct


@pytest.mark.parametrize("name", sorted(set(RIGHT_TEXTS) - {"body", "prompts_import"}))
def test_the_assertions_say_what_is_asked_for(
    check: CodeCheck, ask: Callable[..., Question], name: str
) -> None:
    assert check(RIGHT_TEXTS[name], ask(tests=TESTS)).correct


def test_code_is_judged_with_the_packages_of_its_tests(
    check: CodeCheck, ask: Callable[..., Question]
) -> None:
    tests = ["import numpy as np\nassert np.allclose(add(0.1, 0.2), 0.3)"]
    assert check(f"```python\n{RIGHT}\n```", ask(tests=tests)).correct
    assert not check("```python\ndef add(a, b):\n    return a\n```", ask(tests=tests)).correct
    with_numpy = CodeCheck(timeout_s=10.0, memory_mb=512, packages=("numpy",))
    code = "```python\nimport numpy\ndef add(a, b):\n    return int(numpy.add(a, b))\n```"
    assert with_numpy(code, ask(tests=TESTS)).correct


def test_a_record_whose_own_solution_fails_is_refused(
    check: CodeCheck, ask: Callable[..., Question]
) -> None:
    check.check_record(ask(tests=TESTS, solution=RIGHT))
    check.check_record(ask(tests=TESTS))
    check.check_record(
        ask(tests=ASKED, prompt=PROMPT, entry_point="add", solution="    return a + b")
    )
    with pytest.raises(RecmasError, match="its own solution fails its tests: AssertionError"):
        check.check_record(ask(tests=TESTS, solution=RIGHT.replace("+", "-")))
    with pytest.raises(RecmasError, match="RM602") as refused:
        check.check_record(ask(tests=["import no_such_package", *TESTS], solution=RIGHT))
    assert "pip install no_such_package" in refused.value.problems[0].hint


CONTEST = {
    "pow": ("print(pow(2, 10, 1000))", "24"),
    "sum_of_a_list": ("print(sum([1, 2]), max(3, 4), abs(-1), open is not None)", "3 4 1 True"),
    "imports": (
        "print(gcd(4, 6), defaultdict(int)[1], datetime.date(2024, 1, 1).year)",
        "2 0 2024",
    ),
    "decimals": ("print('0.50', 1)", "0.5 1.0"),
    "recursion": ("f = lambda n: 0 if n == 0 else 1 + f(n - 1)\nprint(f(20000))", "20000"),
    "cached_recursion": (
        "@lru_cache(None)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nprint(f(5000))",
        "5000",
    ),
    "future": ("from __future__ import annotations\nprint(1)", "1"),
    "main_block": ("if __name__ == '__main__':\n    print(1)", "1"),
    "status": ("print(1)\nsys.exit(1)", "1"),
    "trailing_space": ("print('a ')\nprint()", "a"),
    "numpy": ("import numpy\nprint(numpy.arange(3).sum())", "3"),
}


@pytest.mark.parametrize("name", CONTEST)
def test_contests_are_judged_as_their_authors_do(
    ask: Callable[..., Question], check: CodeCheck, name: str
) -> None:
    judge = CodeCheck(timeout_s=10.0, memory_mb=1024, packages=("numpy",))
    code, wanted = CONTEST[name]
    question = ask(inputs=[{"input": "1\n", "output": f"{wanted}\n"}])
    assert judge(f"```python\n{code}\n```", question).correct


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        ("1 2\n", "1 2", True),
        ("1  2", "1 2", True),
        ("1e3", "1000", True),
        ("0.1", "0.10000000000000000001", False),
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("1\r\n2\r\n", "1\n2", True),
        ("Yes", "YES", False),
        ("nan", "1", False),
        ("sNaN 1", "1 1", False),
        ("50000000000000000", "50000000000000001", False),
    ],
)
def test_outputs(found: str, wanted: str, equal: bool) -> None:
    assert equal_output(found, wanted) is equal


def test_the_block_of_a_script_is_the_one_that_reads(
    check: CodeCheck, ask: Callable[..., Question]
) -> None:
    script = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    behind = "```python\ndef test():\n    assert 1 + 2 == 3\n\n\ntest()\n```"
    assert check(f"{script}\nChecked by:\n{behind}", ask(inputs=STDIN)).correct


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
