"""Multiple choice: texts and the letters that they mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recmas_compiler.evaluation.checks.text import ChoiceCheck, extract_letter
from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import RecmasError

CHOICES = ["bank", "library", "department store", "mall", "new york"]
LISTED = "A. bank\nB. library\nC. department store\nD. mall\nE. new york"

TEXTS = [
    ("The answer is (B).", "B"),
    ("The answer is B", "B"),
    ("The answer is: **B**", "B"),
    ("the answer is b.", "B"),
    ("the answer is $B$", "B"),
    ("The correct answer is **B. library**", "B"),
    ("Answer: B", "B"),
    ("Answer: (A) bank", "A"),
    ("The best answer is option (C)", "C"),
    ("So the correct choice is D.", "D"),
    ("The correct option is B", "B"),
    ("The answer is A because it is a bank.", "A"),
    ("The answer is A, bank.", "A"),
    ("The answer is \\boxed{B}", "B"),
    ("\\boxed{\\text{B}}", "B"),
    ("\\boxed{library}", "B"),
    ("<answer>C</answer>", "C"),
    ("B", "B"),
    ("b", "B"),
    ("(b)", "B"),
    ("B)", "B"),
    ("**B**", "B"),
    ("B: library", "B"),
    ("- B. library", "B"),
    ("a) bank", "A"),
    ("library", "B"),
    ("department store", "C"),
    ("The answer is library.", "B"),
    ("The answer is a bank", "A"),
    ("The answer is A library", "B"),
    ("The correct answer is:\n\nB. library", "B"),
    ("A revolving door is used in a bank.", "A"),
    ("I think it is option C because of the doors", "C"),
    ("D. mall\nBecause it is busy.", "D"),
    ("First I thought the answer is A. But the answer is D.", "D"),
    ("<think>It is A.</think>B", "B"),
    ("The answer is B) library and not A) bank", "B"),
    (f"{LISTED}\n\nB", "B"),
    (LISTED, None),
    ("The answer is A or B", None),
    ("The answer is (A) or (B).", None),
    ("A revolving door is convenient.", None),
    ("Both bank and library fit", None),
    ("It is a department store, not a mall", None),
    ("The answer is F.", None),
    ("Answer: I don't know", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "letter"), TEXTS)
def test_letters(text: str, letter: str | None) -> None:
    assert extract_letter(text, CHOICES) == letter


def test_a_choice_may_begin_with_a_letter() -> None:
    assert extract_letter("The answer is D-dimer.", ["ECG", "V/Q scan", "D-dimer", "CT"]) == "C"


def test_verdicts(ask: Callable[..., Question]) -> None:
    check = ChoiceCheck()
    question = ask("B", choices=CHOICES)
    assert check("The answer is (B).", question).correct
    wrong = check("The answer is (C).", question)
    assert (wrong.correct, wrong.extracted) == (False, "C")
    unclear = check("The answer is A or B", question)
    assert (unclear.correct, unclear.extracted, unclear.score) == (False, None, 0.0)


@pytest.mark.parametrize(
    ("answer", "choices", "message"),
    [
        ("B", None, "no list of choices"),
        ("F", CHOICES, "not a letter A to E"),
        ("BC", CHOICES, "BC"),
    ],
)
def test_unusable_questions(
    ask: Callable[..., Question], answer: str, choices: list[str] | None, message: str
) -> None:
    with pytest.raises(RecmasError, match=message):
        ChoiceCheck()("B", ask(answer, choices=choices))
