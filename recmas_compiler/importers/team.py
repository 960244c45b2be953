"""What a reader finds in the files of another framework: agents, order, texts, and the rest.

Every reader returns a `Team`; `spec_text.write_spec` is the one that takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from recmas_compiler.spec.checks.settings import RESERVED_TAGS
from recmas_compiler.spec.document.places import SourcePosition
from recmas_compiler.spec.schema.sections import MAX_AGENTS

_LONGEST_NAME: Final = 64


@dataclass(frozen=True)
class Field:
    """A place in a text that shows a field of the record."""

    name: str


@dataclass(frozen=True)
class Message:
    """A place in a text that shows what agents hand over; several where each may be the last."""

    agents: tuple[str, ...]


@dataclass(frozen=True)
class Blank:
    """A place in a text that stands to be filled in: the files do not say what is asked."""

    agent: str


Part = str | Field | Message | Blank
Text = tuple[Part, ...]

Sampling = dict[str, int | float | tuple[str, ...]]
"""Keys of the section `answer` with their values."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the answer agent may call.

    Attributes:
        functions: Names; the program that runs the system provides them.
    """

    python: bool = False
    ask: bool = False
    functions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.python or self.ask or self.functions)


@dataclass(frozen=True, kw_only=True)
class TeamAgent:
    """An agent: who it is, what it is asked, what it is to give.

    Attributes:
        name: A name that the language allows; no two agents share one.
        places: Where its file, or files, declare it.
    """

    name: str
    places: tuple[SourcePosition, ...]
    system: Text = ()
    task: Text = ()
    expected: Text = ()

    @property
    def texts(self) -> tuple[Text, ...]:
        """All its texts."""
        return self.system, self.task, self.expected

    @property
    def shown_senders(self) -> list[str]:
        """The agents whose messages its texts name, each once."""
        found = [part.agents for text in self.texts for part in text if isinstance(part, Message)]
        return list(dict.fromkeys(agent for agents in found for agent in agents))


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A key that was not carried over, and why."""

    key: str
    place: SourcePosition
    reason: str


@dataclass(frozen=True, kw_only=True)
class Team:
    """A team as its files say it.

    Attributes:
        form: What it was, such as "a crew of CrewAI".
        files: Every file that was read, as messages name it.
        agents: In the order in which they run within a round.
        edges: Who hands over to whom. An edge to an agent that is not behind in `agents` reaches it
            in the next round.
        answer: The agent that writes the answer.
        rounds: None if the files do not say.
        asks_question: Whether every agent sees the user's question.
        examples: Values that the files have for fields of the record.
        num_carried: Keys that have a meaning here.
        remarks: What was read otherwise than it runs there, with the place.
    """

    name: str
    form: str
    files: tuple[str, ...]
    agents: tuple[TeamAgent, ...]
    edges: tuple[tuple[str, str], ...]
    answer: str
    rounds: int | None = None
    asks_question: bool = True
    tools: Tools = field(default_factory=Tools)
    sampling: Sampling = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    num_carried: int = 0
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[tuple[SourcePosition, str], ...] = ()

    def __post_init__(self) -> None:
        names = [agent.name for agent in self.agents]
        assert len(set(names)) == len(names) <= MAX_AGENTS, names
        assert {self.answer, *(end for edge in self.edges for end in edge)} <= set(names)

    def split_edges(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return the edges within a round, and those to the next one; both sorted by agents."""
        rank = {agent.name: i for i, agent in enumerate(self.agents)}
        shown = [(sender, a.name) for a in self.agents for sender in a.shown_senders]
        edges = sorted({*self.edges, *shown}, key=lambda ends: (rank[ends[1]], rank[ends[0]]))
        forward = [ends for ends in edges if rank[ends[0]] < rank[ends[1]]]
        return forward, [ends for ends in edges if rank[ends[0]] >= rank[ends[1]]]


_PYTHON: Final = ("code_interpreter", "built_in_code_execution", "python_repl", "code_execution")
_ASK: Final = ("human_input", "ask_human", "ask_question", "get_user_choice", "human")


def tools_named(names: Iterable[str]) -> Tools:
    """Return the tools of an answer agent, by the names that they have elsewhere.

    What runs code or asks a human has its like here; all others become functions.
    """
    last = [re.split(r"[:.]", name)[-1] for name in names]
    plain = [slug(name.removesuffix("Tool")) for name in last]
    functions = [name for name in plain if name not in (*_PYTHON, *_ASK)]
    free: list[str] = []
    for name in dict.fromkeys(functions):
        free.append(f"{name}_tool" if name in RESERVED_TAGS else name)
    return Tools(
        python=any(name in _PYTHON for name in plain),
        ask=any(name in _ASK for name in plain),
        functions=tuple(dict.fromkeys(free)),
    )


def slug(name: str) -> str:
    """Return a name that the language allows: `StudentAgent` becomes `student_agent`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    plain = re.sub(r"[^a-z0-9_-]+", "_", words.lower()).strip("_-")
    return plain[:_LONGEST_NAME].rstrip("_-") or "agent"


def free_slug(name: str, taken: Mapping[str, object] | Sequence[str]) -> str:
    """Return the slug of a name, with a number where it is taken."""
    base = found = slug(name)
    number = 1
    while found in taken:
        number += 1
        found = f"{base[: _LONGEST_NAME - 4]}_{number}"
    return found
