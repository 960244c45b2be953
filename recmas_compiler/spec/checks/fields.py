"""The warning about prompts that do not show what is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.plan import field_place

# As Python's templates have it. LaTeX and code put braces behind words and marks of their own.
_SINGLE: Final = re.compile(
    r"(?<![\w\\\\{}^$])\{ ?([A-Za-z_][A-Za-z0-9_]*(?:\[[0-9]+\])?) ?\}(?!\})"
)
# What records usually hold, whatever the prompts show.
_USUAL: Final = frozenset({"question", "choices", "problem", "context", "facts"})


def check_fields(declared: Declared) -> Iterator[Problem]:
    """Names in single braces that are meant as fields; prompts that show no field at all."""
    texts = [
        (agent, field, prompt)
        for agent, prompts in declared.prompts.items()
        for field, prompt in prompts.fields()
    ]
    if any(prompt.issues for *_, prompt in texts):
        return  # which may be the fields that seem to be missing
    shown = {
        field_place(p.value).name for *_, prompt in texts for p in prompt.parts if p.kind == "field"
    }
    found = False
    for agent, field, prompt in texts:
        names = [
            name
            for part in prompt.parts
            if part.kind == "text"
            for name in _SINGLE.findall(part.value)
            if field_place(name).name in shown | _USUAL
        ]
        for name in dict.fromkeys(names):
            found = True
            place = declared.inside_prompt_text(agent, field, f"{{{name}}}")
            message = f"`{{{name}}}` is text: the model sees the braces and the name."
            hint = f"Did you mean `{{{{ {name} }}}}`, a field of the record?"
            yield problem_at(place, "RM156", message, hint=hint, severity="warning")
    answer = declared.document.answer.agent
    if not shown and not found and answer in declared.document.agents:
        message = "no prompt shows a field of a record, so every question gets the same answer."
        hint = "Write `{{ question }}` where the question is to stand."
        place = declared.places.key(("agents", answer, "prompt"))
        yield problem_at(place, "RM156", message, hint=hint, severity="warning")
