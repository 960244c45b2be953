"""The registry of codes and its page in the docs."""

from __future__ import annotations

import re
from pathlib import Path

from recmas_runtime.core.errors import CODES, Exit, Problem

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("recmas_compiler", "runtime", "export")
    for path in (ROOT / folder).rglob("*.py")
]


def test_the_docs_list_every_code() -> None:
    rows = re.findall(
        r"^\| (RM\d+) \| (\S+) \| (.*) \|$", (ROOT / "docs/errors.md").read_text(), re.M
    )
    expected = [
        (code, "-" if status is Exit.OK else str(int(status)), meaning)
        for code, (status, meaning) in CODES.items()
    ]
    assert rows == expected


def test_every_code_is_used() -> None:
    text = "\n".join(path.read_text() for path in SOURCES if path.name != "errors.py")
    unused = [code for code in CODES if code not in text]
    assert not unused


def test_a_problem_reads_as_sentences() -> None:
    problem = Problem(
        code="RM105", message="it is 7", hint="Make it 8.", file="a", line=2, column=3
    )
    assert str(problem) == "a:2:3: error[RM105]: it is 7. Make it 8."
    assert str(Problem(code="RM105", message="it is 7.", hint="Make it 8.")) == (
        "error[RM105]: it is 7. Make it 8."
    )
