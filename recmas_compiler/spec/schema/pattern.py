"""The schema of `pattern`: the known arrangements of agents, and what they are to answer."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from recmas_compiler.spec.schema.section import MAX_AGENTS, Given, Section, Slug

Task = Literal["general", "math", "choice", "code", "search"]

Specialists = Annotated[
    tuple[Slug, ...], Field(strict=False, min_length=1, max_length=MAX_AGENTS - 1)
]
Chain = Annotated[tuple[Slug, ...], Field(strict=False, min_length=1, max_length=MAX_AGENTS)]


class MixtureSection(Section):
    """Specialists side by side, and a summarizer that brings their thoughts together."""

    specialists: Specialists
    """Agents that think about the question independently of each other."""

    summarizer: Slug
    """The agent that sees all their thoughts, writes the answer and feeds back to each of them."""


class DistillationSection(Section):
    """An expert and the learner that it guides."""

    expert: Slug
    """The agent that thinks first, usually on the larger backbone."""

    learner: Slug
    """The agent that sees its thoughts, writes the answer and feeds back to it."""


class DeliberationSection(Section):
    """A reflector and a caller, which may use tools."""

    reflector: Slug
    """The agent that thinks about what is known and what is to be done."""

    caller: Slug
    """The agent that sees its thoughts, calls tools (see `answer.tools`), writes the answer and
    feeds back to it."""


class PatternSection(Section):
    """A macro that writes agents, links and `answer`; what is written out wins over it.

    Exactly one arrangement, and a task.
    """

    sequential: Given[Chain] = None
    """Agents in a chain; the last one writes the answer and feeds back to the first."""

    mixture: Given[MixtureSection] = None
    """Parallel specialists and a summarizer."""

    distillation: Given[DistillationSection] = None
    """An expert and a learner."""

    deliberation: Given[DeliberationSection] = None
    """A reflector and a caller of tools."""

    task: Task = "general"
    """What the prompts ask for: an answer in the last line (`general`), a number in `\\boxed{}`
    (`math`), the letter of one of the record's `choices` (`choice`), a block of Python (`code`), a
    short answer (`search`)."""

    @model_validator(mode="after")
    def _name_one_pattern(self) -> Self:
        if len(self.given) != 1:
            raise PydanticCustomError("one_pattern", "should name one", {"given": self.given})
        return self

    @property
    def given(self) -> tuple[str, ...]:
        """The patterns that are named, in the order of the schema; exactly one once checked."""
        return tuple(name for name in PATTERN_NAMES if getattr(self, name) is not None)


PATTERN_NAMES: Final = tuple(name for name in PatternSection.model_fields if name != "task")
