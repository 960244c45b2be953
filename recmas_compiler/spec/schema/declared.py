"""A validated document with its prompts parsed and its links by their ends: what checks look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.prompt_syntax import Prompt, parse_prompt
from recmas_compiler.spec.schema.sections import LinkSection, SpecDocument
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import canonical_link_name, link_ends, link_name

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

    def latent_steps(self, agent: str) -> int:
        """Return the latent steps of an agent."""
        own = self.document.agents[agent].latent_steps
        return self.document.latent_steps if own is None else own

    def link_place(self, source: str, target: str) -> SourcePosition:
        """Return where a link is declared."""
        return self.places.key(("links", link_name(source, target)))

    def inside_prompt(self, agent: str, field: Field, start: int, length: int) -> SourcePosition:
        """Return where a piece of one of an agent's texts stands."""
        section = self.document.agents[agent]
        if field == "system":
            text = section.system or ""
            loc: Loc = ("agents", agent, "system")
        else:
            text = section.prompt.then if field == "then" else section.prompt.first or ""
            loc = self._prompt_loc(agent, field)
        return self.places.inside(loc, text, start, length)

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
