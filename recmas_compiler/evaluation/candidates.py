"""What a right answer is ranked among: other records' answers of the same kind, or its choices.

A wrong answer of another kind is ruled out by the question alone ("Who ...?"), and then a rank says
little about what the system knows. So candidates are of the right answer's kind as far as the set
has such answers: first of its kind and length, then of its kind, then others, which are counted.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from recmas_compiler.evaluation.checks.text import normalize
from recmas_compiler.evaluation.checks.verdict import gold_texts, unusable_gold
from recmas_compiler.evaluation.data.converters import LETTERS
from recmas_compiler.evaluation.data.data_file import Question
from recmas_compiler.evaluation.data.protocol import ScoreSection

AnswerKind = Literal["yes_no", "date", "number", "name", "words"]

_YES_NO: Final = frozenset({"yes", "no", "true", "false"})
_MONTH: Final = re.compile(
    r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? (?:the )?\d"
    r"|\d(?:st|nd|rd|th)? (?:of )?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
    r"|\bcentur(?:y|ies)\b|\b\d{1,4} (?:bc|bce|ad|ce)\b",
    re.IGNORECASE,
)
_YEAR: Final = re.compile(r"(?:in )?(?:1\d|20)\d\ds?|\d{4}-\d\d-\d\d", re.IGNORECASE)
_NUMBER: Final = re.compile(r"\W*\d[\d.,/ ]*(?:\W|\b(?:million|billion|percent)\b)*(?:\s?\w+\W*)?")
_NUMBER_WORDS: Final = frozenset(
    [
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
        "thirty",
        "forty",
        "fifty",
        "hundred",
        "thousand",
    ]
)
# Words that names have in them in small letters.
_SMALL: Final = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "and",
        "or",
        "in",
        "on",
        "at",
        "to",
        "for",
        "de",
        "la",
        "le",
        "von",
        "van",
        "der",
        "da",
        "di",
        "al",
    ]
)
# Most words of a length class; longer texts are one more.
_LENGTHS: Final = (1, 3, 7)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Texts of which one is right.

    Attributes:
        gold: The place of the right one.
        num_other_kind: Those that are of another kind than the right one.
    """

    texts: tuple[str, ...]
    gold: int
    num_other_kind: int = 0


def kind_of(text: str) -> AnswerKind:
    """Return the kind of a short answer, by its form alone.

    - `yes_no`: yes, no, true or false;
    - `date`: a month beside a number, a year from 1000 to 2099, a century, a day as 2026-01-31;
    - `number`: digits with at most one word behind them, or a number word of English that begins
      at most two words;
    - `name`: every word begins with a capital, but for articles and the like;
    - `words`: anything else.
    """
    words = text.split()
    if normalize(text) in _YES_NO:
        return "yes_no"
    if _MONTH.search(text) or _YEAR.fullmatch(text.strip(" .,")):
        return "date"
    first = words[0].lower().partition("-")[0] if words else ""
    if _NUMBER.fullmatch(text) or (first in _NUMBER_WORDS and len(words) <= 2):
        return "number"
    large = [word for word in words if word not in _SMALL]
    if large and all(word.lstrip("\"'(")[:1].isupper() for word in large):
        return "name"
    return "words"


def candidates_of(questions: Sequence[Question], score: ScoreSection) -> tuple[Candidates, ...]:
    """Return for every question its candidates, drawn from the answers of all.

    Raises:
        RecmasError: RM601 for a question without a right text, or where no other text is left.
    """
    if score.by == "likelihood":
        return tuple(Candidates(texts=(_gold(one),), gold=0) for one in questions)
    answers = [() if one.record.fields.get("choices") else gold_texts(one) for one in questions]
    pool = _Pool(texts[0] for texts in answers if texts)
    found = []
    for question, texts in zip(questions, answers, strict=True):
        drawn = _own_choices(question, score) if not texts else pool.draw(question, texts, score)
        if len(drawn.texts) < 2:
            why = f"no other answer can stand beside {drawn.texts[0]!r}"
            raise unusable_gold(question, why, hint="Ask more records, or score by likelihood.")
        found.append(drawn)
    return tuple(found)


def _gold(question: Question) -> str:
    if question.record.fields.get("choices"):
        choices = _own_choices(question, ScoreSection())
        return choices.texts[choices.gold]
    return gold_texts(question)[0]


def _own_choices(question: Question, score: ScoreSection) -> Candidates:
    """Return a record's own choices; its right answer is a letter, or the text of one of them."""
    choices = question.record.fields["choices"]
    listed = [str(choice) for choice in choices] if isinstance(choices, list | tuple) else []
    letters = LETTERS[: len(listed)]
    right = gold_texts(question)[0]
    places = [letters.index(right)] if right and right in letters else []
    places = places or [i for i, text in enumerate(listed) if normalize(text) == normalize(right)]
    if len(places) != 1 or len(set(listed)) < len(listed):
        why = f"the right answer {right!r} is not one of the {len(listed)} different choices"
        raise unusable_gold(question, why)
    texts = tuple(letters) if score.choices == "letter" else tuple(listed)
    return Candidates(texts=texts, gold=places[0])


class _Pool:
    """The different answers of a set, by kind and length."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._by_class: dict[tuple[AnswerKind, int], dict[str, str]] = defaultdict(dict)
        for text in texts:
            self._by_class[_class_of(text)].setdefault(normalize(text) or text, text)

    def draw(self, question: Question, right: Sequence[str], score: ScoreSection) -> Candidates:
        """Return the right answer and others; the same for a record whatever is asked before it."""
        # Not for secrets.
        draw = random.Random(f"{score.seed}/{question.record.id}")  # noqa: S311
        kind, length = _class_of(right[0])
        taken = {normalize(text) or text for text in right}
        # Nothing but yes and no stands beside them.
        last_tier = 1 if kind == "yes_no" else 2
        tiers: list[list[tuple[str, str]]] = [[], [], []]
        for (other, its_length), texts in self._by_class.items():
            tier = 2 if other != kind else int(its_length != length)
            tiers[tier] += texts.items()
        chosen, num_other_kind = [right[0]], 0
        for tier, entries in enumerate(tiers[: last_tier + 1]):
            free = [text for key, text in sorted(entries) if key not in taken]
            drawn = draw.sample(free, min(score.candidates - len(chosen), len(free)))
            chosen += drawn
            num_other_kind += len(drawn) if tier == 2 else 0
        return Candidates(texts=tuple(chosen), gold=0, num_other_kind=num_other_kind)


def _class_of(text: str) -> tuple[AnswerKind, int]:
    count = len(text.split())
    return kind_of(text), sum(count > most for most in _LENGTHS)
