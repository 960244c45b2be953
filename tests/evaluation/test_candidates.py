"""What a right answer is ranked among, by the form of short answers alone."""

from __future__ import annotations

import pytest

from recmas_compiler.evaluation.candidates import candidates_of, kind_of
from recmas_compiler.evaluation.data.data_file import Question
from recmas_compiler.evaluation.data.protocol import ScoreSection
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.running.records import Record


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("yes_no", ["yes", "No.", "TRUE"]),
        ("date", ["1945", "in 1066", "1990s", "May 4, 1979", "4 May 1979"]),
        ("date", ["the 10th century", "44 BC", "2026-01-31", "3rd of June"]),
        ("number", ["18", "-3", "$1,000", "4.5%", "12 km", "3/4", "2.5 million", "20-18", "308"]),
        ("number", ["three", "Twenty-two", "seven people", "70,000"]),
        ("name", ["Paris", "Denver Broncos", "House of Lords", "Ludwig van Beethoven", "NASA"]),
        ("words", ["a golden ball", "kitchen", "the north", "because he was late", ""]),
    ],
)
def test_kinds_by_form(kind: str, texts: list[str]) -> None:
    assert {text: kind_of(text) for text in texts} == dict.fromkeys(texts, kind)


def question(number: int, answer: object, **fields: object) -> Question:
    record = Record(id=f"q{number}", fields={"question": "?", **fields}, index=number)
    return Question(record=record, gold={"answer": answer})


NAMES = ["Paris", "Rome", "Berlin", "Anna Smith", "Bob Miller", "Oslo"]
NUMBERS = ["1", "2", "3"]
QUESTIONS = [
    question(i, answer) for i, answer in enumerate([*NAMES, *NUMBERS, "yes", "no", "Rome."])
]


def test_candidates_are_of_the_right_answers_kind_and_length_first() -> None:
    found = candidates_of(QUESTIONS, ScoreSection(by="candidates", candidates=4))
    assert [one.texts[one.gold] for one in found] == [*NAMES, *NUMBERS, "yes", "no", "Rome."]
    assert set(found[0].texts) == {"Paris", "Rome", "Berlin", "Oslo"}
    assert found[3].texts[:2] == ("Anna Smith", "Bob Miller")
    assert set(found[3].texts[2:]) < {"Paris", "Rome", "Berlin", "Oslo"}
    assert found[0].num_other_kind == found[3].num_other_kind == 0
    # Three numbers are there, so one candidate is something else.
    assert set(found[6].texts[:3]) == set(NUMBERS)
    assert (len(found[6].texts), found[6].num_other_kind) == (4, 1)
    # Nothing but no stands beside yes, and what counts as right beside nothing.
    assert set(found[9].texts) == {"yes", "no"}
    assert "Rome" not in found[11].texts


def test_the_same_seed_draws_the_same_whatever_else_is_asked() -> None:
    score = ScoreSection(by="candidates", candidates=3, seed=7)
    many = [question(i, f"Name{chr(65 + i)}") for i in range(20)]
    assert candidates_of(many, score) == candidates_of(many, score)
    other = score.model_copy(update={"seed": 8})
    assert candidates_of(many, score) != candidates_of(many, other)
    assert candidates_of(many, score)[::-1] == candidates_of(many[::-1], score)


def test_the_first_of_several_right_answers_is_scored_and_no_other_is_drawn() -> None:
    asked = [question(0, ["Rome", "Paris"]), question(1, "Paris"), question(2, "Oslo")]
    first, *_ = candidates_of(asked, ScoreSection(by="candidates"))
    assert first.texts == ("Rome", "Oslo")


@pytest.mark.parametrize(("choices", "told"), [("text", ("red", "blue")), ("letter", ("A", "B"))])
def test_choices_of_a_record_are_its_candidates(choices: str, told: tuple[str, ...]) -> None:
    score = ScoreSection.model_validate({"by": "candidates", "choices": choices})
    asked = [question(0, "B", choices=["red", "blue"]), question(1, "red", choices=["red", "blue"])]
    found = candidates_of(asked, score)
    assert [(one.texts, one.gold) for one in found] == [(told, 1), (told, 0)]
    (alone, _) = candidates_of(asked, ScoreSection(by="likelihood"))
    assert alone.texts == ("blue",)


def test_records_without_a_right_text_or_other_answers_are_refused() -> None:
    score = ScoreSection(by="candidates")
    refused: list[tuple[list[Question], str]] = [
        (
            [question(0, "x"), question(1, "X.")],
            "record 'q0': no other answer can stand beside 'x'",
        ),
        ([question(0, "C", choices=["a", "b"])], "'C' is not one of the 2 different choices"),
        ([question(0, None)], "not a text or number"),
    ]
    for asked, told in refused:
        with pytest.raises(RecmasError, match="RM601") as caught:
            candidates_of(asked, score)
        assert told in caught.value.problems[0].message
