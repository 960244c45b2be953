"""Patterns: macros that write agents, links and `answer` for a known arrangement of agents.

A pattern is expanded in the plain YAML values, before the schema looks at them. What the user wrote
out stays: of an agent, a link or `answer` only what is missing is filled in.

Round 1 leaves the line with the slots out where nothing was sent yet. So everything before the
slots is the same in every round and computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct
from pydantic import ValidationError

from recmas_compiler.spec.document.places import Loc, Places, SourcePosition
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.document.yaml_source import Value
from recmas_compiler.spec.schema.sections import (
    DeliberationSection,
    DistillationSection,
    MixtureSection,
    PatternSection,
    Task,
    ToolsSection,
)
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.messages import Carries

RoleName = Literal[
    "plan",
    "review",
    "solve",
    "alone",
    "specialist",
    "summarize",
    "expert",
    "learner",
    "reflect",
    "call",
]


class TaskTexts(Struct, frozen=True, forbid_unknown_fields=True):
    """What the prompts of a task have of their own; see `prompts.yaml`."""

    question: str
    aim: str
    answer: str


class RoleTexts(Struct, frozen=True, forbid_unknown_fields=True):
    """What the prompts of a role have of their own; see `prompts.yaml`."""

    thoughts: str
    ask: str = ""
    answers: bool = False


class _Wording(Struct, frozen=True, forbid_unknown_fields=True):
    tasks: dict[Task, TaskTexts]
    roles: dict[RoleName, RoleTexts]


_WORDING: Final = msgspec.yaml.decode(
    Path(__file__).with_name("prompts.yaml").read_bytes(), type=_Wording
)
TASKS: Final = _WORDING.tasks
ROLES: Final = _WORDING.roles

_CALLS: Final = (
    "You may use tools. Write a call in this form, and its result follows between <result> and "
    "</result>:"
)


def role_prompts(
    role: RoleName,
    task: Task,
    *,
    agent: str,
    senders: Sequence[str],
    tools: ToolsSection | None,
    carries: Carries = "thoughts",
) -> tuple[str, str]:
    """Return what an agent is asked without and with slots.

    Args:
        senders: The agents whose messages it has slots for; several are named in the text, but
            slots of caches, which stand first and show nothing.
        tools: What it may call, if it answers.
    """
    asked, wanted = ROLES[role], TASKS[task]
    slots = [f"{{{{ latent.{sender} }}}}" for sender in senders]
    if len(senders) > 1 and carries != "cache":
        slots = [f"{sender} {slot}" for sender, slot in zip(senders, slots, strict=True)]
    names = {"aim": wanted.aim, "agent": agent, "slots": ", ".join(slots)}
    ask, thoughts = (Template(text).substitute(names) for text in (asked.ask, asked.thoughts))
    calls = calls_text(tools) if asked.answers and tools is not None else ""
    answer = wanted.answer if asked.answers else ""
    without = _joined(wanted.question, ask, calls, answer)
    if carries == "cache":
        return without, f"{' '.join(slots)}\n{without}"
    return (
        without,
        _joined(wanted.question, ask, calls, thoughts, answer),
    )


def calls_text(tools: ToolsSection) -> str:
    """Return how to call the tools that are on, a line for each."""
    calls = []
    if tools.search is not None:
        calls.append("<search>what to look for</search> finds passages of text.")
    if tools.python is not None:
        calls.append("<python>print(2 + 3)</python> runs a program and shows what it prints.")
    if tools.ask:
        calls.append("<ask>your question</ask> asks a human.")
    calls += [f"<{name}>argument</{name}> calls {name}." for name in tools.functions]
    return "\n".join((_CALLS, *calls)) if calls else ""


def _joined(question: str, *lines: str) -> str:
    """Join what is there; one empty line sets the question apart."""
    return f"{question}\n\n" + "".join(f"{line}\n" for line in lines if line)


@dataclass(frozen=True, kw_only=True)
class Role:
    """An agent of a pattern.

    Attributes:
        loc: Where the pattern names it, below the pattern's own key.
    """

    agent: str
    name: RoleName
    loc: Loc


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who is in a pattern, and who sends thoughts to whom.

    Attributes:
        roles: The agents; the last one writes the answer.
        forward: Links within a round, as (source, target).
        feedback: Links to the next round.
    """

    roles: tuple[Role, ...]
    forward: tuple[tuple[str, str], ...]
    feedback: tuple[tuple[str, str], ...]

    def with_rows(self) -> Layout:
        """Return the layout where agents also read the rows of those that their senders read.

        Rows of a cache were computed knowing those before them. A receiver that has both reads one
        text, and the first row of all.
        """
        forward = links_of_rows([role.agent for role in self.roles], self.forward)
        return replace(self, forward=forward)

    @property
    def answer_agent(self) -> str:
        """The agent that writes the answer."""
        return self.roles[-1].agent

    def senders(self, agent: str) -> tuple[str, ...]:
        """Return whose messages an agent gets."""
        return tuple(
            source for source, target in (*self.forward, *self.feedback) if target == agent
        )

    def waits(self, agent: str) -> bool:
        """Tell whether an agent gets its messages only from the second round on."""
        return any(target == agent for _, target in self.feedback)


def links_of_rows(
    agents: Sequence[str], forward: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """Return links by which agents also read the rows of those that their senders read.

    Args:
        agents: In an order in which every link of `forward` points on.
    """
    read: dict[str, list[str]] = {}
    for agent in agents:
        sources = [source for source, target in forward if target == agent]
        all_read = [earlier for source in sources for earlier in (*read[source], source)]
        read[agent] = list(dict.fromkeys(all_read))
    return tuple((source, agent) for agent, sources in read.items() for source in sources)


def sequential(chain: tuple[str, ...]) -> Layout:
    """Lay out a chain whose end feeds back to its beginning."""
    between: list[RoleName] = ["review"] * (len(chain) - 2)
    names: list[RoleName] = ["plan", *between, "solve"] if len(chain) > 1 else ["alone"]
    return Layout(
        roles=tuple(
            Role(agent=agent, name=name, loc=(i,))
            for i, (agent, name) in enumerate(zip(chain, names, strict=True))
        ),
        forward=tuple(pairwise(chain)),
        feedback=((chain[-1], chain[0]),),
    )


def mixture(section: MixtureSection) -> Layout:
    """Lay out specialists side by side before a summarizer that feeds back to each."""
    specialists, summarizer = section.specialists, section.summarizer
    return Layout(
        roles=(
            *(
                Role(agent=agent, name="specialist", loc=("specialists", i))
                for i, agent in enumerate(specialists)
            ),
            Role(agent=summarizer, name="summarize", loc=("summarizer",)),
        ),
        forward=tuple((agent, summarizer) for agent in specialists),
        feedback=tuple((summarizer, agent) for agent in specialists),
    )


def distillation(section: DistillationSection) -> Layout:
    """Lay out an expert before a learner that feeds back."""
    return _pair(
        Role(agent=section.expert, name="expert", loc=("expert",)),
        Role(agent=section.learner, name="learner", loc=("learner",)),
    )


def deliberation(section: DeliberationSection) -> Layout:
    """Lay out a reflector before a caller of tools that feeds back."""
    return _pair(
        Role(agent=section.reflector, name="reflect", loc=("reflector",)),
        Role(agent=section.caller, name="call", loc=("caller",)),
    )


def _pair(first: Role, second: Role) -> Layout:
    return Layout(
        roles=(first, second),
        forward=((first.agent, second.agent),),
        feedback=((second.agent, first.agent),),
    )


# key of the pattern -> the layout of what stands there
LAYOUTS: Final[dict[str, Callable[[Any], Layout]]] = {
    "sequential": sequential,
    "mixture": mixture,
    "distillation": distillation,
    "deliberation": deliberation,
}


def expand_pattern(root: dict[str, Value], places: Places) -> list[Problem]:
    """Replace `pattern` by what it stands for, in place; a malformed one is left to the schema."""
    try:
        section = PatternSection.model_validate(root.get("pattern"))
    except ValidationError:
        return []
    agents, links, answer = (root.setdefault(key, {}) for key in ("agents", "links", "answer"))
    pattern_place = places.key(("pattern",))
    del root["pattern"]
    if not isinstance(agents, dict) or not isinstance(links, dict):
        return []  # the schema says what is wrong with them
    (name,) = section.given
    layout = LAYOUTS[name](getattr(section, name))
    if section.carries == "cache":
        layout = layout.with_rows()
    problems: list[Problem] = []
    declared_at: dict[str, SourcePosition] = {}
    for role in layout.roles:
        place = places.value(("pattern", name, *role.loc))
        if role.agent in declared_at:
            message = f"the pattern names `{role.agent}` twice."
            hint = "Give every agent of the pattern a name of its own."
            problems.append(problem_at(place, "RM118", message, hint=hint))
        declared_at.setdefault(role.agent, place)
    for agent, place in declared_at.items():
        if agent not in agents:
            places.overwrite(("agents", agent), place)
    backbones = root.get("backbones")
    known = list(backbones) if isinstance(backbones, dict) else []
    if len(known) > 1:
        problems += _without_backbone(agents, known, declared_at)
    defaults = _agents(layout, section, tools=_tools(answer, layout), backbones=known)
    root["agents"] = {
        agent: default | own if isinstance(own := agents.get(agent, {}), dict) else own
        for agent, default in defaults.items()
    } | {agent: own for agent, own in agents.items() if agent not in defaults}
    _add_links(layout, section.carries, links, places, declared_at)
    if isinstance(answer, dict):
        if ("answer",) not in places.values:
            places.overwrite(("answer",), pattern_place)
        default: dict[str, Value] = {"agent": layout.answer_agent}
        root["answer"] = default | answer
    return problems


def _without_backbone(
    agents: dict[str, Value], backbones: list[str], declared_at: dict[str, SourcePosition]
) -> Iterator[Problem]:
    """Find the agents that do not say on which of several backbones they run."""
    for agent, place in declared_at.items():
        own = agents.get(agent, {})
        if isinstance(own, dict) and "backbone" not in own:
            message = f"`{agent}` of the pattern could run on any of {len(backbones)} backbones."
            hint = f"Choose one: `agents: {{{agent}: {{backbone: {backbones[0]}}}}}`."
            yield problem_at(place, "RM118", message, hint=hint)


def _agents(
    layout: Layout, section: PatternSection, *, tools: ToolsSection | None, backbones: list[str]
) -> dict[str, dict[str, Value]]:
    """Return what a pattern says of its agents."""
    agents: dict[str, dict[str, Value]] = {}
    for role in layout.roles:
        without, with_slots = role_prompts(
            role.name,
            section.task,
            agent=role.agent,
            senders=layout.senders(role.agent),
            tools=tools,
            carries=section.carries,
        )
        prompt: Value = with_slots
        if layout.waits(role.agent):
            prompt = {"first": without, "then": with_slots}
        backbone = backbones[0] if backbones else "missing"
        agents[role.agent] = {"backbone": backbone, "prompt": prompt}
    return agents


def _tools(answer: Value, layout: Layout) -> ToolsSection | None:
    """Return the tools that the pattern's last agent may call, as far as they are well-formed."""
    if not isinstance(answer, dict) or "tools" not in answer:
        return None
    if answer.get("agent", layout.answer_agent) != layout.answer_agent:
        return None
    try:
        return ToolsSection.model_validate(answer["tools"])
    except ValidationError:
        return None  # the schema says what is wrong with them


def _add_links(
    layout: Layout,
    carries: Carries,
    links: dict[str, Value],
    places: Places,
    declared_at: dict[str, SourcePosition],
) -> None:
    """Add the pattern's links; one that leads to the next round says so."""
    ends = [(*link, False) for link in layout.forward] + [(*link, True) for link in layout.feedback]
    for source, target, is_feedback in ends:
        name = link_name(source, target)
        if name not in links:
            places.overwrite(("links", name), declared_at[target])
        own = links.get(name)
        if own is None or isinstance(own, dict):
            default: dict[str, Value] = {"feedback": is_feedback}
            if carries != "thoughts":
                default["carries"] = carries
            links[name] = default | (own or {})
