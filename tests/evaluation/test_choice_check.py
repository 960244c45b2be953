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
    ("So the correct answer must be B.", "B"),
    ("The correct answer is therefore B.", "B"),
    ("The best answer is option b.", "B"),
    ("B is correct.", "B"),
    ("I would go with B.", "B"),
    ("My choice: B", "B"),
    ("Answer - B", "B"),
    ("A. It is a bank.\nB. It is a library, which fits.\nTherefore, B.", "B"),
    ("\u7b54\u6848\uff1aB", "B"),
    ("\u7b54\u6848\u662fB\u3002", "B"),
    ("\u6b63\u786e\u7b54\u6848\u4e3a B", "B"),
    ("\u6545\u9009B", "B"),
    ("\u7b54\u6848\u4e0d\u662fB", None),
    ("\u7b54\u3048\u306fB\u3067\u3059", "B"),
    ("\uc815\ub2f5\uc740 B\uc785\ub2c8\ub2e4", "B"),
    ("R\u00e9ponse : B", "B"),
    ("La bonne r\u00e9ponse est la B.", "B"),
    ("La r\u00e9ponse n'est pas B.", None),
    ("Antwort: B", "B"),
    ("Die richtige Antwort ist B.", "B"),
    ("Die richtige Antwort lautet B", "B"),
    ("Die Antwort ist nicht B.", None),
    ("Respuesta: B", "B"),
    ("La respuesta correcta es la B.", "B"),
    ("La respuesta no es B.", None),
    ("A resposta correta \u00e9 B.", "B"),
    ("La risposta corretta \u00e8 la B.", "B"),
    ("The answer has to be (C)", "C"),
    ("The answer will be C, I think", "C"),
    ("The correct option here is C.", "C"),
    ("The right answer to the question is **C**", "C"),
    ("Final choice = C", "C"),
    ("Answer -> C", "C"),
    ("Answer => C", "C"),
    ("I choose option C.", "C"),
    ("I pick C because of the doors.", "C"),
    ("I'd say C.", "C"),
    ("I'll go with option c.", "C"),
    ("I am going with C", "C"),
    ("That leaves C.", "C"),
    ("It must be C.", "C"),
    ("Option C is the correct answer.", "C"),
    ("(C) is the best choice.", "C"),
    ("**C** seems to be the most likely.", "C"),
    ("C would be the right answer, not D.", "C"),
    ("The answer is not B. C is correct.", "C"),
    ("A is wrong. B is wrong too. D is right.", "D"),
    ("Some say the answer is A, but D is correct.", "D"),
    ("A is correct.", "A"),
    ("I would go with A.", "A"),
    ("So, D", "D"),
    ("It fits.\n\nThus: (D) mall", "D"),
    ("=> D", "D"),
    ("The answer is not B.", None),
    ("I would not go with B.", None),
    ("I don't choose B", None),
    ("B is not correct.", None),
    ("B is incorrect.", None),
    ("If B is correct, the doors are shut.", None),
    ("Is the answer B?", None),
    ("Could it be B?", None),
    ("I would go with A or B.", None),
    ("A and B is correct.", None),
    ("Choose A, B, C or D.", None),
    ("I choose a shop.", None),
    ("I would go with a hotel.", None),
    ("It is a place.", None),
    ("A person is correct to say so.", None),
    ("The answer must be F.", None),
]


@pytest.mark.parametrize(("text", "letter"), TEXTS)
def test_letters(text: str, letter: str | None) -> None:
    assert extract_letter(text, CHOICES) == letter


CITIES = ["Paris", "Rome", "Berlin", "Madrid"]
WORDINGS = [
    ("The answer's B.", "B"),
    ("I believe B is the right answer", "B"),
    ("I'd go with (B).", "B"),
    ("So I'd pick B", "B"),
    ("We can conclude that the answer is B", "B"),
    ("Answer is B", "B"),
    ("ANSWER: B", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("Answer:B", "B"),
    ("Ans: B", "B"),
    ("Correct answer: B) Rome", "B"),
    ("Final answer: (B) Rome", "B"),
    ("The final answer is $\\boxed{B}$", "B"),
    ("My final answer is B.", "B"),
    ("Thus B is the answer.", "B"),
    ("Hence the answer must be B", "B"),
    ("it's B", "B"),
    ("It is clearly B.", "B"),
    ("Let's choose B", "B"),
    ("The best choice would be B.", "B"),
    ("Option B", "B"),
    ("Option (B) is correct", "B"),
    ("Choice B is the best answer.", "B"),
    ("B. Rome is the correct answer.", "B"),
    ("B) Rome is correct", "B"),
    ("The correct one is B", "B"),
    ("The right choice seems to be B", "B"),
    ("B it is.", "B"),
    ("That would be B.", "B"),
    ("This corresponds to option B.", "B"),
    ("This matches option B.", "B"),
    ("The letter is B.", "B"),
    ("B!", "B"),
    ("Answer: b)", "B"),
    ("The solution is B", "B"),
    ("Therefore the answer is B.", "B"),
    ("Therefore, the correct option is (B).", "B"),
    ("Consequently, B.", "B"),
    ("So the answer: B", "B"),
    ("=> B", "B"),
    ("Answer \u2013 B", "B"),
    ("Answer \u2014 B", "B"),
    ("La r\xe9ponse correcte est B", "B"),
    ("La respuesta es B", "B"),
    ("La opci\xf3n correcta es B.", "B"),
    ("Die Antwort lautet B.", "B"),
    ("Die richtige Option ist B.", "B"),
    ("Richtig ist B.", "B"),
    ("La bonne r\xe9ponse est : B", "B"),
    ("Je choisis B.", "B"),
    ("Ich w\xe4hle B.", "B"),
    ("Elijo B.", "B"),
    ("\u9009B", "B"),
    ("\u7b54\u6848\uff1aB\u3002", "B"),
    ("\u6b63\u786e\u7b54\u6848\u662fB\u3002", "B"),
    ("\u56e0\u6b64\uff0c\u7b54\u6848\u9009B\u3002", "B"),
    ("\u6240\u4ee5\u9009\u62e9B", "B"),
    ("\u7b54\u6848\u4e3a\uff1aB", "B"),
    ("B\u662f\u6b63\u786e\u7b54\u6848", "B"),
    ("\u5e94\u8be5\u9009B\u3002", "B"),
    ("The answer is neither A nor B.", None),
    ("The answer cannot be B.", None),
    ("The answer is anything but B", None),
    ("It can't be B.", None),
    ("Not B.", None),
    ("It isn't B", None),
    ("A good answer is hard to find.", None),
    ("A is a letter.", None),
    ("The answer is A or C", None),
    ("Either A or B is correct.", None),
    ("I choose neither.", None),
    ("Which answer is correct, A or B?", None),
    ("A city in Italy.", None),
    ("I am not sure whether B is correct.", None),
    ("I first thought A, but the answer is C.", "C"),
    ("It is not A, so it must be C.", "C"),
    ("Answer: Not B", None),
    ("We can rule out B.", None),
    ("Eliminate A and B. The answer is D", "D"),
    ("A, B and C are wrong, so D.", "D"),
    ("The answer is not A but C.", "C"),
    ("Vitamin C is important.", None),
    ("The capital A is a letter", None),
    ("I would say that A person is needed", None),
    ("The answer is C, not B.", "C"),
    ("The answer is B (Rome).", "B"),
    ("The answer is B: Rome", "B"),
    ("The answer is B - Rome", "B"),
]


@pytest.mark.parametrize(("text", "letter"), WORDINGS)
def test_plain_words_name_a_choice_or_none(text: str, letter: str | None) -> None:
    assert extract_letter(text, CITIES) == letter


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
