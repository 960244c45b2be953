"""Short answers in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recmas_compiler.evaluation.checks.text import (
    ExactCheck,
    F1Check,
    extract_among,
    f1,
    normalize,
)
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
