"""Programs: the unit tests of a record, run in the sandbox and nowhere else."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

from recmas_compiler.evaluation.checks.code_text import (
    defines,
    extract_code,
    imported_packages,
    is_code,
    parses,
    undefined_names,
)
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
from recmas_runtime.tools.sandbox import Sandbox, SandboxResult, find_sandbox

_IMPORT_TIMEOUT_S: Final = 60.0
_DRIVER: Final = Path(__file__).with_name("program_driver.py")

# What the published judge of LiveCodeBench puts before every program. Built-in names come after
# those of modules, because `math.pow` is no `pow`; the modules themselves come last, because
# `datetime` is one. Source: the rules of LiveCodeBench/LiveCodeBench, testing_util.py.
_STARRED: Final = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random",
    "statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
_RECURSION: Final = 50_000
_CONTEST: Final = "".join(
    [
        *(f"from {name} import *\n" for name in _STARRED),
        *(f"import {name}\n" for name in _STARRED[:-2]),
        f"sys.setrecursionlimit({_RECURSION})\n",
    ]
)


class CodeCheck(Check):
    """Runs a record's unit tests against the code of an answer; all must pass.

    Args:
        timeout_s: For one run: all assertions of a record, one call, or one input.
        memory_mb: Most memory of a run, in MiB.
        packages: What programs may import besides the standard library and what the records' own
            texts import, where it is installed.

    Raises:
        RecmasError: RM602 if this machine has no sandbox.
    """

    def __init__(self, *, timeout_s: float, memory_mb: int, packages: Sequence[str] = ()) -> None:
        self._sandbox = require_sandbox()
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._packages = tuple(packages)
        self._import_failures: dict[str, str] = {}

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        _require_tests(question)
        names, is_script = asked_names(question), bool(_tests(question, "inputs"))
        code = extract_code(without_thinking(answer), names, is_script=is_script)
        if code is None:
            return NO_ANSWER
        return verdict(correct=not self._failure(code, question), extracted=code)

    def check_record(self, question: Question) -> None:
        """Try the record's own solution, if it has one."""
        _require_tests(question)
        for name in sorted(own_imports(question)):
            self._require_package(name)
        solution = own_solution(question)
        if solution is not None and (why := self._failure(solution, question)):
            raise unusable_gold(
                question,
                f"its own solution fails its tests: {why}",
                hint="Correct the record, allow more with `--set check.timeout_s=...` or "
                "`--set check.memory_mb=...`, or pass --skip-broken to leave such records out.",
            )

    def _failure(self, code: str, question: Question) -> str:
        """Return why a program fails the record's tests; empty if it passes them."""
        packages = tuple(sorted({*self._packages, *own_imports(question)}))
        for run in runs_of(code, question, case_s=self._timeout_s):
            result = self._sandbox.run(
                run.program,
                stdin=run.stdin,
                timeout_s=self._timeout_s * run.num_cases,
                memory_mb=self._memory_mb,
                packages=packages,
            )
            if result.status != "ok":
                return _reason(result, self._timeout_s)
            if not equal_output(result.stdout, run.stdout):
                return "its output differs"
        return ""

    def _require_package(self, name: str) -> None:
        """Refuse a package that cannot be imported in the sandbox."""
        if name not in self._import_failures:
            result = self._sandbox.run(
                f"import {name}",
                timeout_s=_IMPORT_TIMEOUT_S,
                memory_mb=self._memory_mb,
                packages=(name,),
            )
            is_there = result.status == "ok"
            self._import_failures[name] = "" if is_there else _reason(result, _IMPORT_TIMEOUT_S)
        if why := self._import_failures[name]:
            place = (
                "where recmas is installed"
                if self._sandbox.name == "bubblewrap"
                else "in the image that the sandbox runs"
            )
            raise fail(
                "RM602",
                f"the records' tests import {name}, which the sandbox does not have: {why}",
                hint=f"Install it {place}: `pip install {name}`.",
            )


def _reason(result: SandboxResult, timeout_s: float) -> str:
    if result.status == "timeout":
        return f"it takes more than {timeout_s:g} s"
    lines = result.stderr_tail.strip().splitlines()
    return lines[-1].strip()[:300] if lines else f"it ended with status {result.exit_code}"


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


def asked_names(question: Question) -> frozenset[str]:
    """Return the names of which an answer must define one."""
    gold = question.gold
    if isinstance(entry_point := gold.get("entry_point"), str):
        return frozenset((entry_point,))
    if isinstance(function := gold.get("function"), str) and _tests(question, "calls"):
        return frozenset((function,))
    return undefined_names("\n".join(map(str, _tests(question, "tests"))))


def own_solution(question: Question) -> str | None:
    """Return the program by which a record answers itself; None if it has none."""
    solution = question.gold.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        return None
    if "```" in solution:
        return extract_code(solution, asked_names(question))
    return solution.strip("\n") if is_code(solution) else None


def own_imports(question: Question) -> frozenset[str]:
    """Return the packages that a record's tests, prompt and solution import."""
    texts = [*map(str, _tests(question, "tests")), question.gold.get("solution")]
    return frozenset().union(*(imported_packages(text) for text in texts if isinstance(text, str)))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A program with what it reads, and what it must write to be right."""

    program: str
    stdin: str
    stdout: str
    num_cases: int = 1


def runs_of(code: str, question: Question, *, case_s: float) -> Iterator[Run]:
    """Yield what has to be run for code to be right; a call may take so many seconds."""
    gold = question.gold
    parts = [code]
    prompt, entry_point = gold.get("prompt"), gold.get("entry_point")
    if isinstance(prompt, str) and isinstance(entry_point, str):
        parts = with_prompt(code, prompt, entry_point)
    mark = secrets.token_hex(16)
    if asserted := _tests(question, "tests"):
        parts = [*parts, "\n".join(map(str, asserted))]
        yield Run(program=_driven(parts, "tests"), stdin=f"{mark}\n", stdout=mark)
    if calls := _tests(question, "calls"):
        program = _driven(
            [_CONTEST, code], "calls", str(gold["function"]), json.dumps(list(calls)), case_s
        )
        yield Run(program=program, stdin=f"{mark}\n", stdout=mark, num_cases=1 + len(calls))
    for case in _tests(question, "inputs"):
        program = _driven([_CONTEST, code], "input")
        yield Run(program=program, stdin=case["input"], stdout=case["output"])


def _driven(*arguments: object) -> str:
    return (
        f"{_DRIVER.read_text(encoding='ascii')}\n\ndrive(*json.loads({json.dumps(arguments)!r}))\n"
    )


def _require_tests(question: Question) -> None:
    if not any(_tests(question, kind) for kind in ("tests", "calls", "inputs")):
        raise unusable_gold(question, "has no unit tests")


def _tests(question: Question, kind: str) -> Sequence[Any]:
    tests: Any = question.gold.get(kind) or ()
    return (tests,) if isinstance(tests, str) else tests


def with_prompt(code: str, prompt: str, entry_point: str) -> list[str]:
    """Return the parts of a program from a completion of `prompt`, which it may repeat or not."""
    if defines(code, entry_point):
        # The prompt's imports and helpers; its own version of the function is replaced.
        head = prompt[: prompt.rfind(f"def {entry_point}")]
        return [head, code] if parses(head) else [code]
    head, lines = prompt.rstrip(), code.splitlines()
    # Of a body that was cut out of its text the first line may have lost its indentation.
    bodies = [_indented(lines), "\n".join([f"    {lines[0]}", *lines[1:]])]
    if code.startswith((" ", "\t")):
        bodies.insert(0, code)
    programs = [f"{head}\n{body}\n" for body in bodies]
    return [next(filter(parses, programs), programs[0])]


def equal_output(found: str, wanted: str) -> bool:
    """Tell whether two outputs are equal as LiveCodeBench's published judge compares them.

    The space around them and around lines aside, there are as many lines, and each is the same text
    or the same decimal numbers: 0.50 is 0.5.
    """
    left, right = _lines(found), _lines(wanted)
    return len(left) == len(right) and all(map(_equal_line, left, right))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _equal_line(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    try:
        return [*map(Decimal, found.split())] == [*map(Decimal, wanted.split())]
    except InvalidOperation:
        return False


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" if line.strip() else line for line in lines)
