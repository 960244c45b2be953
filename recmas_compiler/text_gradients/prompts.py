"""Which texts of prompts learn, and how a prompt or a spec looks with others in their place."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import structs

from recmas_compiler.spec.document.yaml_source import parse_yaml, write_yaml
from recmas_compiler.spec.schema.declared import parse_prompt
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.plan import AgentPlan, Plan, PrefillStep, PromptPart, prompt_fields

Place = Literal["system", "first", "then"]
_PLACES: Final[tuple[Place, ...]] = ("system", "first", "then")
# Keys of the language whose values may be paths.
_PATHS: Final = ("source", "template", "weights", "corpus", "loss_text")
_OPENING: Final = re.compile(r"\{\{|\{%|\{#")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A text of an agent that learns.

    Attributes:
        name: `AGENT.PLACE`, of the first place where it stands.
        places: Where the same text stands.
        is_system: Whether it is the system text.
    """

    name: str
    agent: str
    text: str
    places: tuple[Place, ...]

    @property
    def is_system(self) -> bool:
        """Whether it is the system text."""
        return self.places == ("system",)


def template_of(parts: Iterable[PromptPart]) -> str:
    """Return parts of a prompt as specs write them; what would begin a mark is kept as text."""
    written = {"field": "{{{{ {} }}}}", "slot": "{{{{ latent.{} }}}}"}
    return "".join(
        written[part.kind].format(part.value) if part.kind in written else _escaped(part.value)
        for part in parts
    )


def _escaped(text: str) -> str:
    return f"{{% raw %}}{text}{{% endraw %}}" if _OPENING.search(text) else text


def parameters_of(plan: Plan, *, rewrites: str) -> tuple[Parameter, ...]:
    """Return the texts of a plan that learn, agent by agent; equal ones of an agent are one.

    Args:
        rewrites: `instructions` for the longest run of lines without fields and slots, `prompt` for
            whole prompts, whose fields must stay.

    Raises:
        RecmasError: RM508 if there is none.
    """
    found: list[Parameter] = []
    for name, agent in plan.agents.items():
        used = _used_places(plan, name, agent)
        texts = {
            place: text
            for place in _PLACES
            if (text := _learning_text(_parts(agent, place), rewrites=rewrites))
        }
        for text in dict.fromkeys(texts[place] for place in used if place in texts):
            places = tuple(place for place in texts if texts[place] == text)
            label = "system" if places == ("system",) else "prompt"
            taken = {one.name for one in found}
            label = label if f"{name}.{label}" not in taken else f"prompt.{places[0]}"
            found.append(Parameter(name=f"{name}.{label}", agent=name, text=text, places=places))
    if not found:
        raise fail(
            "RM508",
            "textgrad: no prompt has a line without fields and slots that could learn",
            hint="Give --textgrad rewrites=prompt, or write instructions on a line of their own.",
        )
    return tuple(found)


def with_texts(plan: Plan, texts: Mapping[str, str], *, rewrites: str) -> Plan:
    """Return a plan with other texts for its parameters, by name."""
    agents = dict(plan.agents)
    for parameter in parameters_of(plan, rewrites=rewrites):
        text = texts[parameter.name]
        agent = agents[parameter.agent]
        changes = {
            place: parse_prompt(_replaced(_parts(agent, place), parameter.text, text)).parts
            for place in parameter.places
        }
        agents[parameter.agent] = structs.replace(agent, **changes)
    return structs.replace(plan, agents=agents, fields=prompt_fields(agents.values()))


def spec_with_texts(spec_yaml: str, plan: Plan, texts: Mapping[str, str], *, rewrites: str) -> str:
    """Return a resolved spec with other texts for the parameters of its plan."""
    root: Any = copy.deepcopy(parse_yaml(spec_yaml, file="spec.yaml").value)
    changed = with_texts(plan, texts, rewrites=rewrites)
    for parameter in parameters_of(plan, rewrites=rewrites):
        agent = root["agents"][parameter.agent]
        for place in parameter.places:
            written = template_of(_parts(changed.agents[parameter.agent], place))
            if place == "system":
                agent["system"] = written
            elif isinstance(agent["prompt"], dict):
                agent["prompt"][place] = written
            else:
                agent["prompt"] = written
    return write_yaml(root)


def has_relative_paths(spec_yaml: str) -> bool:
    """Tell whether a resolved spec names files from where it stands."""
    return any(
        not Path(value.removeprefix("gguf:")).is_absolute()
        for key, value in _texts(parse_yaml(spec_yaml, file="spec.yaml").value)
        if key in _PATHS and not value.startswith(("builtin:", "hf:")) and value != "none"
    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a document with the key that it stands under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, name)
    elif isinstance(value, str):
        yield key, value


def marks_of(text: str) -> Counter[tuple[str, str]]:
    """Return the fields and slots of a template, each with how often it stands there."""
    parts = parse_prompt(text).parts
    return Counter((part.kind, part.value) for part in parts if part.kind != "text")


def keeps_marks(before: str, after: str) -> bool:
    """Tell whether a text has the fields and slots of another and no mark that means nothing."""
    return not parse_prompt(after).issues and marks_of(before) == marks_of(after)


def marks_text(text: str) -> str:
    """Return the fields and slots of a template as they are written in it."""
    parts = [part for part in parse_prompt(text).parts if part.kind != "text"]
    return ", ".join(template_of([part]) for part in parts)


def _parts(agent: AgentPlan, place: Place) -> tuple[PromptPart, ...]:
    parts: tuple[PromptPart, ...] | None = getattr(agent, place)
    return parts or ()


def _used_places(plan: Plan, name: str, agent: AgentPlan) -> Iterator[Place]:
    """Yield the places whose texts some step of the plan reads."""
    yield "system"
    variants = {
        variant
        for step in plan.steps
        if isinstance(step, PrefillStep)
        for of, variant in zip(step.agents, step.variants, strict=True)
        if of == name
    }
    if "first" in variants:
        yield "first" if agent.first is not None else "then"
    if "then" in variants:
        yield "then"


def _learning_text(parts: tuple[PromptPart, ...], *, rewrites: str) -> str:
    """Return the part of a prompt that learns; empty if there is none."""
    template = template_of(parts)
    if rewrites == "prompt":
        return template
    lines = template.split("\n")
    runs = [
        "\n".join(run).strip()
        for is_plain, run in groupby(lines, key=lambda line: _OPENING.search(line) is None)
        if is_plain
    ]
    if "{% raw %}" in template:  # such text may go over lines
        return ""
    return max(runs, key=len, default="")


def _replaced(parts: tuple[PromptPart, ...], before: str, after: str) -> str:
    """Return a template with another text in place of the last occurrence of one."""
    head, found, tail = template_of(parts).rpartition(before)
    assert found, "a parameter stands in its places"
    return head + after + tail
