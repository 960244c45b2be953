"""Answer checks: from the text of an answer to a verdict."""

from __future__ import annotations

from recmas_compiler.evaluation.checks.math import MathCheck
from recmas_compiler.evaluation.checks.text import (
    SQUAD,
    ChoiceCheck,
    ExactCheck,
    F1Check,
)
from recmas_compiler.evaluation.checks.verdict import Check
from recmas_compiler.evaluation.data.protocol import (
    CheckSection,
    ChoiceSection,
    CodeSection,
    ExactSection,
    F1Section,
    MathSection,
    SquadSection,
)


def make_check(section: CheckSection) -> Check:
    """Return the check that a protocol asks for.

    Raises:
        RecmasError: RM602 if it runs programs and there is no sandbox to do so.
    """
    match section:
        case MathSection():
            return MathCheck(timeout_s=section.timeout_s)
        case ChoiceSection():
            return ChoiceCheck()
        case ExactSection():
            return ExactCheck(among=section.among)
        case F1Section():
            return F1Check()
        case SquadSection():
            return F1Check(SQUAD)
        case CodeSection():
            from recmas_compiler.evaluation.checks.code import CodeCheck

            return CodeCheck(
                timeout_s=section.timeout_s,
                memory_mb=section.memory_mb,
                packages=section.packages,
            )


__all__ = ["make_check"]
