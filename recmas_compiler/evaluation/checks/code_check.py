"""Programs: the unit tests of a record, run in the sandbox and nowhere else."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recmas_compiler.evaluation.checks.answer_text import spoken
from recmas_compiler.evaluation.checks.code_program import (
    assertion_program,
    call_program,
    equal_output,
    extract_code,
    input_program,
    with_prompt,
)
from recmas_compiler.evaluation.checks.gold import unusable_gold
from recmas_compiler.evaluation.checks.verdict import (
    NO_ANSWER,
    Question,
    StatelessCheck,
    Verdict,
    verdict,
)
from recmas_runtime.core.errors import fail
from recmas_runtime.tools.sandbox import Sandbox, find_sandbox


@dataclass(frozen=True)
class _Run:
    """One run of a program: what it reads, and what it must write."""

    program: str
    stdin: str
    stdout: str


class CodeCheck(StatelessCheck):
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
        code = extract_code(spoken(answer))
        if code is None:
            return NO_ANSWER
        return verdict(correct=all(map(self._passes, _runs(code, question))), extracted=code)

    def _passes(self, run: _Run) -> bool:
        result = self._sandbox.run(
            run.program, stdin=run.stdin, timeout_s=self._timeout_s, memory_mb=self._memory_mb
        )
        return result.status == "ok" and equal_output(result.stdout, run.stdout)


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


def _runs(code: str, question: Question) -> Iterator[_Run]:
    """Yield what must succeed for the code to be right."""
    gold = question.gold
    prompt, entry_point = gold.get("prompt"), gold.get("entry_point")
    if isinstance(prompt, str) and isinstance(entry_point, str):
        code = with_prompt(code, prompt, entry_point)
    mark = secrets.token_hex(16)
    if asserted := _tests(question, "tests"):
        program = assertion_program(code, [str(test) for test in asserted])
        yield _Run(program, f"{mark}\n", mark)
    if calls := _tests(question, "calls"):
        cases = [(case["arguments"], case["result"]) for case in calls]
        yield _Run(call_program(code, str(gold["function"]), cases), f"{mark}\n", mark)
    for case in _tests(question, "inputs"):
        yield _Run(input_program(code), case["input"], case["output"])


def _tests(question: Question, kind: str) -> Sequence[Any]:
    tests: Any = question.gold.get(kind) or ()
    return (tests,) if isinstance(tests, str) else tests
