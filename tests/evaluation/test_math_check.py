"""Mathematics: what counts as the answer, and what as equal to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recmas_compiler.evaluation.checks.math import MathCheck, MathProcess, numbers_in, read_number
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import RecmasError


@pytest.fixture(scope="module")
def check() -> Iterator[MathCheck]:
    with MathCheck(timeout_s=20.0) as made:
        yield made


# gold, what the model wrote, what is taken for its answer, right?
GSM8K = [
    ("18", "She makes 9 * 2 = $18 every day at the market.\n#### 18", "18", True),
    ("18", "The answer is 18.", "18", True),
    ("18", "The answer is $18.00.", "$18.00", True),
    ("18", "The answer is **18** dollars.", "18", True),
    ("18", "**The final answer is: 18**", "18", True),
    ("18", "So she makes $18 per day.", "$18", True),
    ("18", "The answer is 18 dollars, because she sells 9 eggs at $2.", "18", True),
    ("18", "The answer is 16 - 3 - 4 = 9 * 2 = 18.", "18", True),
    ("18", "The answer is $9 \\times 2 = 18$.", "18", True),
    ("18", "The answer is 20. No, wait. The answer is 18.", "18", True),
    ("18", "\\boxed{18}", "18", True),
    ("18", "First \\boxed{9}, and then \\boxed{18}.", "18", True),
    ("18", "\\boxed{18} eggs, of which 3 were eaten.", "18", True),
    ("18", "\\boxed{\\text{18 dollars}}", "\\text{18 dollars}", True),
    ("18", "The answer is 17.", "17", False),
    ("18", "It is 9.", "9", False),
    ("18", "I do not know.", None, False),
    ("18", "", None, False),
    ("18", "<think>\\boxed{18}</think>\nThe answer is 7.", "7", False),
    ("18", "Let me compute. \\boxed{18", "18", True),
    ("1200", "The answer is 1,200.", "1,200", True),
    ("1200", "That makes 1,200 eggs", "1,200", True),
    ("1234567", "Total: $1,234,567.", "$1,234,567", True),
    ("-5", "The answer is -5.", "-5", True),
    ("-5", "The temperature is \u22125 degrees", "-5", True),
    ("5", "10-5=5", "5", True),
    ("25", "That is 25%.", "25%", True),
    ("25", "The answer is 25 percent.", "25 percent", True),
    ("0.25", "The answer is 25%.", "25%", True),
    ("0.5", "The answer is \\frac{1}{2}.", "\\frac{1}{2}", True),
    ("0.5", "She eats 1/2 of it.", "1/2", True),
    ("2.5", "The answer is 2 1/2 cups.", "2 1/2 cups", True),
    ("60", "The answer is 60 miles per hour.", "60 miles per hour", True),
    ("3", "The answer is 3.5.", "3.5", False),
    ("35", "The answer is 3.5.", "3.5", False),
    ("12345678", "The answer is 12345679.", "12345679", False),
    ("0.333333", "The answer is 1/3.", "1/3", True),
    ("7", "Answer:\n\n7", "7", True),
    ("7", "Answer:\n\n**7**\n\nThis uses 12 steps.", "7", True),
    ("8", "To find the answer: first add 3 and 5. That makes 8.", "8", True),
    ("8", "3 + 5 = 8. Answer: 8. It took 2 steps.", "8", True),
    ("8", "### Final Answer:\n\n$$8$$", "8", True),
    ("7", "<result>\n99\n</result>\nSo it is 7.", "7", True),
    ("7", "It is 7.\n<result>\n99\n</result>\n", "7", True),
]

MATH = [
    ("\\frac{1}{2}", "\\boxed{0.5}", True),
    ("\\frac{1}{2}", "\\boxed{\\dfrac12}", True),
    ("\\frac{1}{2}", "The answer is $\\frac{2}{4}$.", True),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", False),
    ("70 \\sqrt{2}", "\\boxed{70\\sqrt{2}}", True),
    ("70 \\sqrt{2}", "\\boxed{\\sqrt{9800}}", True),
    ("70 \\sqrt{2}", "\\boxed{70\\sqrt{3}}", False),
    ("p - q", "Hence the sum is $\\boxed{p-q}$.", True),
    ("p - q", "\\boxed{-q + p}", True),
    ("p - q", "\\boxed{q - p}", False),
    ("(6,31,-1)", "\\boxed{(6, 31, -1)}", True),
    ("(6,31,-1)", "\\boxed{(6, 31, 1)}", False),
    ("\\text{Evelyn}", "\\boxed{Evelyn}", True),
    ("\\text{Evelyn}", "\\boxed{\\text{Debra}}", False),
    ("2x + 3", "\\boxed{3 + 2x}", True),
    ("2x", "\\boxed{2y}", False),
    ("288 \\pi", "So the volume is $288\\pi$.", True),
    ("x^2 - 1", "The answer is $(x-1)(x+1)$.", True),
    ("11,\\! 111,\\! 100", "\\boxed{11111100}", True),
    ("90^\\circ", "\\boxed{90}", True),
    ("5 \\text{ cm}^2", "\\boxed{5}", True),
    ("\\$32,\\!348", "The answer is $32,348.", True),
    ("(-\\infty,3)", "\\boxed{x<3}", True),
    ("x<3", "\\boxed{(-\\infty,3)}", True),
    ("[2,5)", "\\boxed{2 \\le x < 5}", True),
    ("(-\\infty,3)", "\\boxed{x \\le 3}", False),
    ("(-\\infty,3)", "\\boxed{x<4}", False),
]


@pytest.mark.parametrize(("gold", "text", "extracted", "correct"), GSM8K)
def test_numbers(
    check: MathCheck,
    ask: Callable[..., Question],
    gold: str,
    text: str,
    extracted: str | None,
    correct: bool,
) -> None:
    verdict = check(text, ask(gold))
    assert verdict.extracted == extracted
    assert verdict.correct is correct
    assert verdict.score == float(correct)


@pytest.mark.parametrize(("gold", "text", "correct"), MATH)
def test_expressions(
    check: MathCheck, ask: Callable[..., Question], gold: str, text: str, correct: bool
) -> None:
    pytest.importorskip("math_verify", reason="extra `eval` is not installed")
    assert check(text, ask(gold)).correct is correct


def test_a_number_as_the_right_answer(check: MathCheck, ask: Callable[..., Question]) -> None:
    assert check("\\boxed{204}", ask(204)).correct


@pytest.mark.parametrize("answer", [None, True, {"a": 1}, [], ["1", "2"]])
def test_unusable_right_answers(
    check: MathCheck, ask: Callable[..., Question], answer: object
) -> None:
    with pytest.raises(RecmasError, match="RM601"):
        check("18", ask(answer))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,234.50", 1234.5),
        ("-\\frac{3}{4}", -0.75),
        ("2\\frac{1}{2}", 2.5),
        ("1.5 \\times 10^{3}", 1500),
        ("1.5e3", 1500),
        ("x = 5", 5),
        (".5", 0.5),
        ("3/8", 0.375),
        ("+3", 3),
        ("60 miles/hour", 60),
        ("\u20ac 12", 12),
        ("18 dollars and cents", None),
        ("2x", None),
        ("2 sin x", None),
        ("2\\pi", None),
        ("3\\sqrt{2}", None),
        ("(1,2)", None),
        ("3 or 5", None),
        ("\\frac{1}{0}", None),
        ("", None),
        ("9" * 300, None),
    ],
)
def test_reading_numbers(text: str, value: float | None) -> None:
    number = read_number(text)
    assert (None if number is None else float(number.value)) == value


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("16 - 3 - 4 = 9 eggs, 9*2=$18.", ["16", "3", "4", "9", "9", "2", "$18"]),
        ("between 10-20", ["10", "20"]),
        ("-$5 or $-5", ["-$5", "$-5"]),
        ("the 3 sets 1,234 and 1,2,3", ["3", "1,234", "1", "2", "3"]),
        ("2 1/2 cups at 50 \\%", ["2 1/2", "50 %"]),
        ("none", []),
    ],
)
def test_numbers_in_sentences(text: str, numbers: list[str]) -> None:
    assert numbers_in(text) == numbers


def test_without_math_verify_expressions_are_compared_as_text(
    ask: Callable[..., Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    with MathCheck(timeout_s=5.0) as check:
        monkeypatch.setattr(check._process, "is_available", False)
        assert check("\\boxed{p-q}", ask("p - q")).correct
        assert check("\\boxed{\\dfrac{x}{2}}", ask("\\frac{x}{2}")).correct
        assert check("\\boxed{18.0}", ask("18")).correct
        assert not check("\\boxed{-q+p}", ask("p - q")).correct


STUCK = """
import sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('{"ready": true}', flush=True)
for line in sys.stdin:
    if "forever" in line:
        while True:
            time.sleep(1)
    print('{"equal": true}', flush=True)
"""


def test_a_stuck_comparison_is_killed_and_the_next_one_runs(tmp_path: Path) -> None:
    worker = tmp_path / "stuck.py"
    worker.write_text(STUCK)
    with MathProcess(0.3, worker=worker) as process:
        process.is_available = True
        assert process.equal("x", "y") is True
        assert process._process is not None
        first = process._process.pid
        assert process.equal("x", "forever") is None
        assert process.num_killed == 1
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        assert process.equal("x", "y") is True
        assert process._process is not None
        assert process._process.pid != first


def test_a_worker_that_cannot_start_is_not_asked_again(tmp_path: Path) -> None:
    worker = tmp_path / "broken.py"
    worker.write_text("raise SystemExit(1)")
    with MathProcess(5.0, worker=worker) as process:
        process.is_available = True
        assert process.equal("x", "y") is None
        assert process.is_available is False


def test_expensive_expressions_end(ask: Callable[..., Question]) -> None:
    pytest.importorskip("math_verify", reason="extra `eval` is not installed")
    with MathCheck(timeout_s=2.0) as check:
        assert not check("\\boxed{9^{9^{9^{9^{9}}}} + x}", ask("x + 1")).correct
        assert check("\\boxed{-q + p}", ask("p - q")).correct


def test_no_process_is_left_behind() -> None:
    pytest.importorskip("math_verify", reason="extra `eval` is not installed")
    code = (
        "from recmas_compiler.evaluation.checks.math import MathProcess\n"
        "with MathProcess(20.0) as process:\n"
        "    process.equal('x', 'x + 0')\n"
        "    print(process._process.pid)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)


@pytest.mark.parametrize(
    "attempt",
    [
        "open('made', 'w')",
        "os.open('made', os.O_CREAT | os.O_WRONLY)",
        "os.system('true')",
        "subprocess.run(['true'])",
        "os.fork()",
        "socket.socket()",
        "os.remove('there')",
    ],
)
def test_the_process_that_compares_can_do_nothing_else(tmp_path: Path, attempt: str) -> None:
    (tmp_path / "there").touch()
    code = (
        "import os, socket, subprocess\n"
        "from recmas_compiler.evaluation.checks.math_worker import shut_doors\n"
        "shut_doors()\n"
        "open('there').close()\n"
        "try:\n"
        f"    {attempt}\n"
        "except PermissionError:\n"
        "    print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout == "refused\n", ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
