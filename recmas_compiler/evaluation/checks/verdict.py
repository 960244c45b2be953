"""What a check is given and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from recmas_runtime.running.records import Record


@dataclass(frozen=True, kw_only=True)
class Question:
    """A record of a data set: the part that prompts may show, and the part they never see.

    Attributes:
        record: What the system is asked.
        gold: What only the check sees: `answer`, unit tests.
    """

    record: Record
    gold: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a check says of an answer.

    Attributes:
        correct: Whether it counts as right.
        extracted: What was taken for the answer; None if the text holds none.
        score: From 0 to 1, where a check knows degrees; else 0 or 1.
    """

    correct: bool
    extracted: str | None
    score: float


NO_ANSWER = Verdict(correct=False, extracted=None, score=0.0)


def verdict(*, correct: bool, extracted: str) -> Verdict:
    """Return a verdict that knows no degrees."""
    return Verdict(correct=correct, extracted=extracted, score=float(correct))


class Check(Protocol):
    """Judges answers. A context manager, because some checks keep a process."""

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge the text of an answer.

        Raises:
            RecmasError: RM601 if the question's gold answer is of a form that this check cannot
                use.
        """

    def __enter__(self) -> Self:
        """Return the check itself."""

    def __exit__(self, *exception: object) -> None:
        """Free what the check holds."""


class StatelessCheck:
    """A check that holds nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
