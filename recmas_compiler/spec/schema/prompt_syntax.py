"""Prompt text to parts: literal text, fields of the input record, slots. Nothing else.

The syntax is that of Jinja so that it looks familiar, but a prompt has no logic: what is fixed at
compile time can be checked, counted and reused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from recmas_runtime.formats.ids import SLUG_PATTERN
from recmas_runtime.formats.plan import PromptPart

_OPENING = re.compile(r"\{\{|\{%|\{#")
_CLOSING = {"{{": "}}", "{%": "%}", "{#": "#}"}
_FIELD = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*\Z")
_SLOT = re.compile(rf"\s*latent\s*\.\s*({SLUG_PATTERN})\s*\Z")

# A prompt in another language has an issue on every line; the first ones tell.
_MOST_ISSUES = 10
_ALLOWED = "Prompts know only `{{ field }}` and `{{ latent.AGENT }}`."


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A slot of a prompt and where it stands in the text."""

    agent: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class PromptIssue:
    """A piece of a prompt that is not allowed."""

    start: int
    length: int
    message: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A parsed prompt.

    Attributes:
        parts: In order; white space around the whole prompt is left out, because YAML blocks end
            with a line break that nobody means.
        slots: The slots, as often as they occur.
        issues: What is not allowed, the first few; it is left out of `parts`.
    """

    parts: tuple[PromptPart, ...]
    slots: tuple[Slot, ...]
    issues: tuple[PromptIssue, ...]

    @property
    def slot_agents(self) -> tuple[str, ...]:
        """The agents that have a slot, each once, in order."""
        return tuple(slot.agent for slot in self.first_slots)

    @property
    def first_slots(self) -> tuple[Slot, ...]:
        """The first slot of every agent that has one, in order."""
        first: dict[str, Slot] = {}
        for slot in self.slots:
            first.setdefault(slot.agent, slot)
        return tuple(first.values())


def parse_prompt(text: str) -> Prompt:
    """Split a prompt into its parts."""
    parts: list[PromptPart] = []
    slots: list[Slot] = []
    issues: list[PromptIssue] = []
    at = 0
    while len(issues) < _MOST_ISSUES and (opening := _OPENING.search(text, at)):
        parts.append(PromptPart(kind="text", value=text[at : opening.start()]))
        start, mark = opening.start(), opening.group()
        closing = text.find(_CLOSING[mark], opening.end())
        if closing < 0:
            hint = f"Close it with `{_CLOSING[mark]}`. {_ALLOWED}"
            message = f"`{mark}` is never closed."
            issues.append(PromptIssue(start=start, length=len(mark), message=message, hint=hint))
            at = len(text)
            break
        at = closing + 2
        inner = text[opening.end() : closing]
        length = at - start
        if mark == "{{" and (slot := _SLOT.match(inner)):
            parts.append(PromptPart(kind="slot", value=slot.group(1)))
            slots.append(Slot(agent=slot.group(1), start=start, length=length))
        elif mark == "{{" and (name := _FIELD.match(inner)) and name.group(1) != "latent":
            parts.append(PromptPart(kind="field", value=name.group(1)))
        else:
            issues.append(_issue(text[start:at], start))
    parts.append(PromptPart(kind="text", value=text[at:]))
    return Prompt(parts=_trimmed(parts), slots=tuple(slots), issues=tuple(issues))


def _issue(piece: str, start: int) -> PromptIssue:
    shown = " ".join(piece.split())
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    hint = _ALLOWED
    match piece[:2]:
        case "{%":
            message = f"`{shown}` is logic, which prompts do not have."
            hint += " To ask differently in round 1, use `first` and `then`."
        case "{#":
            message = f"`{shown}` is a Jinja comment, which prompts do not have."
            hint += " Write comments in the YAML around the prompt."
        case _:
            message = f"`{shown}` is neither a field nor a slot."
    return PromptIssue(start=start, length=len(piece), message=message, hint=hint)


def _trimmed(parts: list[PromptPart]) -> tuple[PromptPart, ...]:
    if parts and parts[0].kind == "text":
        parts[0] = PromptPart(kind="text", value=parts[0].value.lstrip())
    if parts and parts[-1].kind == "text":
        parts[-1] = PromptPart(kind="text", value=parts[-1].value.rstrip())
    return tuple(part for part in parts if part.kind != "text" or part.value)
