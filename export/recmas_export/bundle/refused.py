"""Findings for which a build writes no bundle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from recmas_runtime.core.errors import Problem, RecmasError

OTHER_NUMBERS: Final = (
    "No bundle was written. Try another precision or another version of onnxruntime, and report "
    "the model."
)
OTHER_TEXTS: Final = (
    "No bundle was written. Try other versions of transformers, tokenizers and jinja2, and report "
    "the model."
)


def refuse(findings: Iterable[tuple[str, str]], *, hint: str = OTHER_NUMBERS) -> None:
    """Raise RM301 with all findings, such as those of `formats.precisions`, if there are any."""
    problems = [
        Problem(code="RM301", message=f"{what}: {finding}.", hint=hint)
        for what, finding in findings
    ]
    if problems:
        raise RecmasError(problems)
