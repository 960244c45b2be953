"""A validated document with its prompts parsed and its links by their ends: what checks look at.

The syntax of prompts is that of Jinja so that it looks familiar, but a prompt has no logic: what is
fixed at compile time can be checked, counted and reused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.document import SpecDocument
from recmas_compiler.spec.schema.sections import LinkSection
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import SLUG_PATTERN, canonical_link_name, link_ends, link_name
from recmas_runtime.formats.plan import MAX_FIELD_INDEX, PromptPart

_OPENING = re.compile(r"\{\{|\{%|\{#")
_CLOSING = {"{{": "}}", "{%": "%}", "{#": "#}"}
_FIELD = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?:\[(.*)\]\s*)?\Z", re.DOTALL)
_INDEX = re.compile(r"\s*(0|[1-9][0-9]{0,8})\s*")
# Text that holds what would otherwise begin something, as Jinja has it.
_QUOTED = re.compile(r"""\{\{\s*(?:"([^"]*)"|'([^']*)')\s*\}\}""")
_RAW = re.compile(r"\{%\s*raw\s*%\}(.*?)\{%\s*endraw\s*%\}", re.DOTALL)
_SLOT = re.compile(rf"\s*latent\s*\.\s*({SLUG_PATTERN})\s*\Z")

# A prompt in another language has an issue on every line; the first ones tell.
_MOST_ISSUES = 10
_ALLOWED = (
    "Prompts know only `{{ field }}`, `{{ field[0] }}` and `{{ latent.AGENT }}`; braces as text go "
    "between "
    "`{% raw %}` and `{% endraw %}`."
)


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
    """Split a prompt into its parts: text, fields and slots.

    `{{ "..." }}` and what stands between `{% raw %}` and `{% endraw %}` is text.
    """
    parts: list[PromptPart] = []
    slots: list[Slot] = []
    issues: list[PromptIssue] = []
    at = 0
    while len(issues) < _MOST_ISSUES and (opening := _OPENING.search(text, at)):
        parts.append(PromptPart(kind="text", value=text[at : opening.start()]))
        start, mark = opening.start(), opening.group()
        if escaped := _QUOTED.match(text, start) or _RAW.match(text, start):
            parts.append(PromptPart(kind="text", value=escaped.group(escaped.lastindex or 0)))
            at = escaped.end()
            continue
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
            field, index = name.groups()
            if message := "" if index is None else _wrong_index(field, index):
                hint = f"Entries count from 0: `{{{{ {field}[0] }}}}` is the first one."
                issues.append(PromptIssue(start=start, length=length, message=message, hint=hint))
            else:
                value = field if index is None else f"{field}[{index.strip()}]"
                parts.append(PromptPart(kind="field", value=value))
        else:
            issues.append(_issue(text[start:at], start))
    parts.append(PromptPart(kind="text", value=text[at:]))
    return Prompt(parts=_trimmed(parts), slots=tuple(slots), issues=tuple(issues))


def _wrong_index(field: str, index: str) -> str:
    """Return what is wrong with an entry of a field; empty if nothing is."""
    if field == "id":
        return "the `id` of a record is no list."
    if _INDEX.fullmatch(index) is None:
        return f"{show(index.strip())} is no entry of `{field}`: not a whole number from 0."
    is_beyond = int(index) > MAX_FIELD_INDEX
    return f"entry {index.strip()} of `{field}` is beyond {MAX_FIELD_INDEX}." if is_beyond else ""


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
    merged: list[PromptPart] = []
    for part in parts:
        if part.kind == "text" and merged and merged[-1].kind == "text":
            part = PromptPart(kind="text", value=merged.pop().value + part.value)
        if part.kind != "text" or part.value:
            merged.append(part)
    return tuple(merged)


Field = Literal["system", "first", "then"]


@dataclass(frozen=True, kw_only=True)
class AgentPrompts:
    """The texts of an agent, parsed."""

    system: Prompt
    first: Prompt | None
    then: Prompt

    def fields(self) -> Iterator[tuple[Field, Prompt]]:
        """Yield what is declared, by its key."""
        yield "system", self.system
        if self.first is not None:
            yield "first", self.first
        yield "then", self.then


@dataclass(frozen=True)
class Declared:
    """A validated document and everything that is read out of it.

    Attributes:
        base_dir: Folder that relative paths in the spec start from.
    """

    document: SpecDocument
    places: Places
    base_dir: Path

    @cached_property
    def prompts(self) -> dict[str, AgentPrompts]:
        """Parsed prompts by agent."""
        return {
            name: AgentPrompts(
                system=parse_prompt(agent.system or ""),
                first=None if agent.prompt.first is None else parse_prompt(agent.prompt.first),
                then=parse_prompt(agent.prompt.then),
            )
            for name, agent in self.document.agents.items()
        }

    @cached_property
    def links(self) -> dict[tuple[str, str], LinkSection]:
        """Links by (source, target), in the order of declaration."""
        return {link_ends(name): link for name, link in self.document.links.items()}

    @cached_property
    def known_links(self) -> dict[tuple[str, str], LinkSection]:
        """Links both of whose ends are agents."""
        agents = self.document.agents
        return {
            (source, target): link
            for (source, target), link in self.links.items()
            if source in agents and target in agents
        }

    def is_remote(self, agent: str) -> bool:
        """Tell whether an agent runs on a model behind an API."""
        backbone = self.document.backbones.get(self.document.agents[agent].backbone)
        return backbone is not None and backbone.is_remote

    @property
    def remote_agents(self) -> tuple[str, ...]:
        """The agents that run on models behind an API."""
        return tuple(name for name in self.document.agents if self.is_remote(name))

    def latent_steps(self, agent: str) -> int:
        """Return the latent steps of an agent; one behind an API takes none."""
        if self.is_remote(agent):
            return 0
        own = self.document.agents[agent].latent_steps
        return self.document.latent_steps if own is None else own

    def sent_by(self, agent: str) -> dict[tuple[str, str], LinkSection]:
        """Return the links over which an agent has something to send."""
        steps = self.latent_steps(agent)
        return {
            ends: link
            for ends, link in self.known_links.items()
            if ends[0] == agent and link.form.is_sent(steps)
        }

    def link_place(self, source: str, target: str) -> SourcePosition:
        """Return where a link is declared."""
        return self.places.key(("links", link_name(source, target)))

    def inside_prompt(self, agent: str, field: Field, start: int, length: int) -> SourcePosition:
        """Return where a piece of one of an agent's texts stands."""
        is_system = field == "system"
        loc: Loc = ("agents", agent, "system") if is_system else self._prompt_loc(agent, field)
        return self.places.inside(loc, self._text(agent, field), start, length)

    def inside_prompt_text(self, agent: str, field: Field, piece: str) -> SourcePosition:
        """Return where a piece of text stands in one of an agent's texts for the first time."""
        return self.inside_prompt(
            agent, field, max(0, self._text(agent, field).find(piece)), len(piece)
        )

    def _text(self, agent: str, field: Field) -> str:
        section = self.document.agents[agent]
        if field == "system":
            return section.system or ""
        return section.prompt.then if field == "then" else section.prompt.first or ""

    def _prompt_loc(self, agent: str, field: Field) -> Loc:
        """A prompt that is plain text has no `then` key of its own."""
        whole: Loc = ("agents", agent, "prompt")
        return (*whole, field) if (*whole, field) in self.places.values else whole


def normalize_link_names(root: dict[str, Value], places: Places) -> list[Problem]:
    """Rewrite the keys of `links` to their canonical form, in place."""
    links = root.get("links")
    if not isinstance(links, dict):
        return []
    problems: list[Problem] = []
    normalized: dict[str, Value] = {}
    written: dict[str, str] = {}  # canonical name -> the name as written
    for name, link in links.items():
        place = places.key(("links", name))
        canonical = canonical_link_name(name)
        if canonical is None:
            message = f"{show(name)} is not a link name."
            hint = "Write `source -> target` with the names of two agents."
            problems.append(problem_at(place, "RM119", message, hint=hint))
        elif canonical in normalized:
            first = places.key(("links", written[canonical]))
            message = f"the link `{canonical}` is given a second time, first in line {first.line}."
            problems.append(problem_at(place, "RM102", message, hint="Remove one of the two."))
        else:
            normalized[canonical], written[canonical] = link, name
    renamed = {name: canonical for canonical, name in written.items() if name != canonical}
    places.rename(("links",), renamed)
    root["links"] = normalized
    return problems
