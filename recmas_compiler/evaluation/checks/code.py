"""Programs: the unit tests of a record, run in the sandbox and nowhere else."""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from itertools import starmap
from typing import Any, Final

from recmas_compiler.evaluation.checks.verdict import (
    NO_ANSWER,
    Check,
    Verdict,
    unusable_gold,
    verdict,
    without_thinking,
)
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import fail
from recmas_runtime.tools.sandbox import Sandbox, find_sandbox


class CodeCheck(Check):
    """Runs a record's unit tests against the code of an answer; all must pass.

    Args:
        timeout_s: For one run: all assertions of a record, or one input.
        memory_mb: Most memory of a run, in MiB.

    Raises:
        RecmasError: RM602 if this machine has no sandbox.
    """

    def __init__(self, *, timeout_s: float, memory_mb: int) -> None:
        self._sandbox = require_sandbox()
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        if not any(_tests(question, kind) for kind in ("tests", "calls", "inputs")):
            raise unusable_gold(question, "has no unit tests")
        code = extract_code(without_thinking(answer))
        if code is None:
            return NO_ANSWER
        return verdict(correct=all(starmap(self._passes, _runs(code, question))), extracted=code)

    def _passes(self, program: str, stdin: str, stdout: str) -> bool:
        result = self._sandbox.run(
            program, stdin=stdin, timeout_s=self._timeout_s, memory_mb=self._memory_mb
        )
        return result.status == "ok" and equal_output(result.stdout, stdout)


def require_sandbox() -> Sandbox:
    """Return this machine's sandbox.

    Raises:
        RecmasError: RM602 if it has none.
    """
    sandbox = find_sandbox()
    if sandbox is None:
        raise fail(
            "RM602",
            "this protocol runs code that models write, and there is no sandbox here to run it in",
            hint="Install bubblewrap, docker or podman; `recmas doctor` says what it finds.",
        )
    return sandbox


def _runs(code: str, question: Question) -> Iterator[tuple[str, str, str]]:
    """Yield programs with what they read and what they must write for the code to be right."""
    gold = question.gold
    prompt, entry_point = gold.get("prompt"), gold.get("entry_point")
    if isinstance(prompt, str) and isinstance(entry_point, str):
        code = with_prompt(code, prompt, entry_point)
    mark = secrets.token_hex(16)
    if asserted := _tests(question, "tests"):
        program = "\n".join((_PROLOGUE, code, *map(str, asserted), _EPILOGUE))
        yield program, f"{mark}\n", mark
    if calls := _tests(question, "calls"):
        cases = [(case["arguments"], case["result"]) for case in calls]
        yield call_program(code, str(gold["function"]), cases), f"{mark}\n", mark
    for case in _tests(question, "inputs"):
        program = f"{_COMMON_IMPORTS}\n{code}\n"
        yield program, case["input"], case["output"]


def _tests(question: Question, kind: str) -> Sequence[Any]:
    tests: Any = question.gold.get(kind) or ()
    return (tests,) if isinstance(tests, str) else tests


_FENCE: Final = r"^[ \t]*(?:```|~~~)[ \t]*"
_FENCED: Final = re.compile(rf"{_FENCE}(\w*)[^\n]*\n(.*?){_FENCE}", re.MULTILINE | re.DOTALL)
_OPEN_FENCE: Final = re.compile(rf"{_FENCE}(?:python|py)?[ \t]*\n(.*)\Z", re.MULTILINE | re.DOTALL)
_PYTHON: Final = ("", "python", "python3", "py")

# Keeps what the candidate prints away from the mark that the tests were reached and passed. The
# mark is read from standard input and printed at the very end, so leaving early does not look like
# success.
_PROLOGUE: Final = """\
import io as _io, sys as _sys
class _Nowhere(_io.StringIO):
    def write(self, text):
        return len(text)
_mark = _sys.stdin.readline()
_sys.stdout = _Nowhere()
"""
_EPILOGUE: Final = """
_sys.__stdout__.write(_mark)
_sys.__stdout__.flush()
"""
# What LiveCodeBench's problems take for granted.
_COMMON_IMPORTS: Final = """\
import bisect, collections, functools, heapq, itertools, math, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
"""
_CALLS: Final = """
_target = Solution().{name} if "Solution" in globals() else {name}
for _arguments, _wanted in _json.loads({cases!r}):
    _found = _target(*_arguments)
    _found = list(_found) if isinstance(_found, tuple) else _found
    assert _found == _wanted, (_arguments, _found, _wanted)
"""


def extract_code(text: str) -> str | None:
    """Return the Python code of a model's text: its last fenced block, or all of it if it is code.

    A block that defines something is preferred to a later one that only uses it. A fence
    that was never closed, because the text was cut off, reaches to the end.
    """
    blocks = [code for language, code in _FENCED.findall(text) if language.lower() in _PYTHON]
    if not blocks:
        opened = _OPEN_FENCE.search(text)
        if opened is not None:
            blocks = [opened.group(1)]
    defining = [block for block in blocks if re.search(r"^\s*(?:def|class) ", block, re.MULTILINE)]
    if blocks:
        return (defining or blocks)[-1].strip("\n") or None
    return text.strip("\n") if _is_code(text) else None


def with_prompt(code: str, prompt: str, entry_point: str) -> str:
    """Return a whole program from a completion of `prompt`, which may or may not repeat it."""
    if re.search(rf"^\s*def {re.escape(entry_point)}\b", code, re.MULTILINE):
        # The prompt's imports and helpers; its own version of the function is replaced.
        head = prompt[: prompt.rfind(f"def {entry_point}")]
        return f"{head}\n{code}\n"
    body = code if code.startswith((" ", "\t")) else _indented(code)
    return f"{prompt.rstrip()}\n{body}\n"


def call_program(code: str, name: str, cases: Sequence[tuple[list[object], object]]) -> str:
    """Return a program that calls a function, or a method of `Solution`, and compares results."""
    calls = _CALLS.format(name=name, cases=json.dumps(cases))
    return "\n".join((_PROLOGUE, _COMMON_IMPORTS, code, "import json as _json", calls, _EPILOGUE))


def equal_output(found: str, wanted: str) -> bool:
    """Tell whether two outputs have the same lines, trailing spaces and blank lines aside."""
    return _lines(found) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def _indented(code: str) -> str:
    return "\n".join(f"    {line}" if line.strip() else line for line in code.splitlines())


def _is_code(text: str) -> bool:
    """Tell whether a text without fences is Python: it parses, also as a function's body."""
    for candidate in (text, f"def f():\n{text}"):
        try:
            tree = ast.parse(candidate)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        # "forty" and "Yes" parse too.
        return any(not isinstance(node, ast.Expr) for node in tree.body)
    return False
