"""The right answer of a question, in the forms that data sets have it."""

from __future__ import annotations

from recmas_compiler.evaluation.checks.verdict import Question
from recmas_runtime.core.errors import RecmasError, fail


def gold_texts(question: Question) -> tuple[str, ...]:
    """Return every text that counts as right; never none.

    Raises:
        RecmasError: RM601 if `answer` is neither text, a number, nor a list of them.
    """
    answer = question.gold.get("answer")
    listed = answer if isinstance(answer, list | tuple) else (answer,)
    texts = tuple(str(a).strip() for a in listed if isinstance(a, str | int | float))
    if not texts or len(texts) != len(listed) or any(isinstance(a, bool) for a in listed):
        raise unusable_gold(question, f"the right answer is {answer!r}, not a text or number")
    return texts


def gold_text(question: Question) -> str:
    """Return the one right answer.

    Raises:
        RecmasError: RM601 if there are several, or none.
    """
    first, *others = gold_texts(question)
    if others:
        raise unusable_gold(question, f"has {len(others) + 1} right answers where one is expected")
    return first


def unusable_gold(question: Question, message: str) -> RecmasError:
    """Return the error for a question that a check cannot use."""
    return fail(
        "RM601",
        f"record {question.record.id!r}: {message}",
        hint="Correct the record, or choose a protocol whose check reads such answers.",
    )
