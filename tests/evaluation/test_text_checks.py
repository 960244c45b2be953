"""Short answers in words."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from recmas_compiler.evaluation.checks.code import extract_code
from recmas_compiler.evaluation.checks.math import extract_math
from recmas_compiler.evaluation.checks.text import (
    ExactCheck,
    F1Check,
    extract_among,
    extract_letter,
    extract_words,
    f1,
    normalize,
)
from recmas_compiler.evaluation.checks.verdict import opened_thinking, without_thinking
from recmas_compiler.evaluation.data.data_file import Question


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("David Dinkins", "The answer is David Dinkins.", True),
        ("David Dinkins", "david dinkins", True),
        ("The Beatles", "Beatles", True),
        ("Titan IIIE", "He asked.\n\nFinal answer: **Titan IIIE**", True),
        ("Titan IIIE", "\\boxed{\\text{Titan IIIE}}", True),
        ("Titan IIIE", "<answer>Titan IIIE</answer>", True),
        ("Titan IIIE", "It was launched on a Titan IIIE rocket.", False),
        ("Titan IIIE", "The answer is Atlas.", False),
        (["JFK", "John F. Kennedy"], "The answer is John F Kennedy.", True),
        (1984, "The answer is 1984.", True),
        ('Jonny" Craig', "Jonny Craig", True),
    ],
)
def test_exact(ask: Callable[..., Question], gold: object, text: str, correct: bool) -> None:
    assert ExactCheck()(text, ask(gold)).correct is correct


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes, they are.", "yes"),
        ("No.", "no"),
        ("The answer is yes.", "yes"),
        ("**Answer: No**", "no"),
        ("There is no reason to doubt it. So the answer is yes.", "yes"),
        ("Genghis Khan had sixteen children.\nTherefore, yes.", "yes"),
        ("It is yes or no.", None),
        ("The answer is unclear.", None),
        ("Perhaps.", None),
        ("", None),
        ("\\boxed{\\text{No}}", "no"),
        ("yes", "yes"),
    ],
)
def test_yes_or_no(ask: Callable[..., Question], text: str, found: str | None) -> None:
    assert extract_among(text, ["yes", "no"]) == found
    verdict = ExactCheck(among=["yes", "no"])(text, ask("yes"))
    assert (verdict.extracted, verdict.correct) == (found, found == "yes")


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("Titan IIIE", "The answer is Titan IIIE", 1.0),
        ("Titan IIIE", "The answer is the Titan rocket", 0.5),
        ("Titan IIIE", "The answer is Atlas", 0.0),
        (["Titan IIIE", "Titan rocket"], "The answer is the Titan rocket", 1.0),
        ("yes", "The answer is yes it is", 0.0),
        ("a b c d", "b c", 0.8),
    ],
)
def test_f1(ask: Callable[..., Question], gold: object, text: str, score: float) -> None:
    verdict = F1Check()(text, ask(gold))
    assert verdict.score == pytest.approx(score)
    assert verdict.correct is (score == 1.0)


def test_no_text_is_no_answer(ask: Callable[..., Question]) -> None:
    for check in (ExactCheck(), F1Check()):
        assert check(" \n", ask("x")).extracted is None


def test_normal_form() -> None:
    assert normalize("The  U.S. (an  old Name)!") == "us old name"
    assert f1("", "") == 1.0
    assert f1("", "x") == 0.0


MARKS = [
    ("<think>", "</think>"),
    ("<Think>\n", "\n</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    ("analysisWe see.", "assistantfinal"),
]


@pytest.mark.parametrize(("opens", "closes"), MARKS)
def test_thinking_is_no_answer(opens: str, closes: str) -> None:
    guess, said = "The answer is A.", "The answer is B."
    assert without_thinking(f"{opens}{guess}{closes}{said}").strip() == said
    assert without_thinking(f"{guess}{closes}{said}").strip() == said
    assert without_thinking(f"{opens}{guess}").strip() == ""
    if not opens.startswith("analysis"):  # a word, which begins thinking at the start only
        again = f"{opens}{guess}{closes}{said}{opens}{guess}"
        assert without_thinking(again).strip() == said
        assert without_thinking(f"{again}{closes}").strip() == said
        assert opened_thinking(f"Q<|assistant|>{opens}\n") == f"{opens}\n"
    assert opened_thinking(f"Q<|assistant|>{opens}{closes}\n\n") == ""
    assert extract_letter(f"{opens}{guess}", ["x", "y"]) is None
    assert extract_words(f"{opens}{guess}") is None
    assert extract_among(f"{opens}yes", ["yes", "no"]) is None
    assert extract_math(f"{opens}The answer is 5.", wants_number=True) is None
    assert extract_code(without_thinking(f"{opens}\n```python\nx = 1\n```")) is None


def test_long_answers_are_read_in_time() -> None:
    start = time.perf_counter()
    for text in (
        "The answer is" + "\n * " * 5_000,
        "B is " * 5_000,
        "answer " * 5_000,
        "<think>" * 5_000,
        "the correct answer is the correct " * 5_000,
        "(" * 5_000,
    ):
        extract_letter(text, ["x", "y"])
    assert time.perf_counter() - start < 10
