"""The released styles: their agents, models and links, as their authors named them.

Sources: the RecursiveMAS repositories (https://huggingface.co/RecursiveMAS) and their code
(https://github.com/RecursiveMAS/RecursiveMAS).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.core.errors import fail

ORGANISATION: Final = "RecursiveMAS"
DEFAULT_TASK: Final = "math"
_TASK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

INNER_CONFIG: Final = "innerlink_config.json"
OUTER_CONFIG: Final = "outerlink_config.json"

# The released names of the two forms of `ln_residual`.
INNER_TYPE: Final = "ln_res_adapter"
OUTER_TYPE: Final = "outer_ln_res_adapter"


@dataclass(frozen=True, kw_only=True)
class ReleasedAgent:
    """An agent of a style.

    Attributes:
        role: Its name in specs.
        title: Its name in repositories.
        model: The released model's name, as the repository's name ends.
    """

    role: str
    title: str
    model: str


@dataclass(frozen=True, kw_only=True)
class ReleasedLink:
    """An outer link of a style.

    Attributes:
        key: Its name in `outerlink_config.json`, there called `legacy_key`.
        source: Role of the agent that sends.
        target: Role of the agent that receives.
        feedback: Whether its message is seen in the next round.
    """

    key: str
    source: str
    target: str
    feedback: bool = False


@dataclass(frozen=True, kw_only=True)
class Style:
    """A released arrangement of agents.

    Attributes:
        name: As users choose it.
        paradigm: Arrangement; styles of one paradigm differ in their models only.
        prefix: How the names of its repositories begin.
        agents: In order of their turns.
        links: In the order of their keys.
        answer: Role of the agent that writes the answer.
    """

    name: str
    paradigm: str
    prefix: str
    agents: tuple[ReleasedAgent, ...]
    links: tuple[ReleasedLink, ...]
    answer: str

    @property
    def outer_repository(self) -> str:
        """Name of the repository with the outer links."""
        return f"{self.prefix}-Outerlinks"

    def agent_repository(self, role: str) -> str:
        """Return the released name of an agent's repository."""
        agent = self.agent(role)
        return f"{self.prefix}-{agent.title}-{agent.model}"

    def agent(self, role: str) -> ReleasedAgent:
        """Return the agent with this role, which must exist."""
        return next(agent for agent in self.agents if agent.role == role)


def _agents(**models: str) -> tuple[ReleasedAgent, ...]:
    return tuple(
        ReleasedAgent(role=role, title=role.capitalize(), model=model)
        for role, model in models.items()
    )


_SEQUENTIAL_LINKS: Final = (
    ReleasedLink(key="outer_12", source="planner", target="critic"),
    ReleasedLink(key="outer_23", source="critic", target="solver"),
    ReleasedLink(key="outer_31", source="solver", target="planner", feedback=True),
)

_STYLES: Final = (
    Style(
        name="sequential_light",
        paradigm="sequential",
        prefix="Sequential-Light",
        agents=_agents(planner="Qwen3-1.7B", critic="Llama3.2-1B", solver="Qwen2.5-Math-1.5B"),
        links=_SEQUENTIAL_LINKS,
        answer="solver",
    ),
    Style(
        name="sequential_scaled",
        paradigm="sequential",
        prefix="Sequential-Scaled",
        agents=_agents(planner="Gemma3-4B", critic="Llama3.2-3B", solver="Qwen3.5-4B"),
        links=_SEQUENTIAL_LINKS,
        answer="solver",
    ),
    Style(
        name="mixture",
        paradigm="mixture",
        prefix="Mixture",
        agents=_agents(
            math="DeepSeek-R1-Distill-Qwen-1.5B",
            code="Qwen2.5-Coder-3B",
            science="BioMistral-7B",
            summarizer="Qwen3.5-2B",
        ),
        links=(
            ReleasedLink(key="outer_1s", source="math", target="summarizer"),
            ReleasedLink(key="outer_2s", source="code", target="summarizer"),
            ReleasedLink(key="outer_3s", source="science", target="summarizer"),
            ReleasedLink(key="outer_s1", source="summarizer", target="math", feedback=True),
            ReleasedLink(key="outer_s2", source="summarizer", target="code", feedback=True),
            ReleasedLink(key="outer_s3", source="summarizer", target="science", feedback=True),
        ),
        answer="summarizer",
    ),
    Style(
        name="distillation",
        paradigm="distillation",
        prefix="Distillation",
        agents=_agents(expert="Qwen3.5-9B", learner="Qwen3.5-4B"),
        links=(
            ReleasedLink(key="outer_el", source="expert", target="learner"),
            ReleasedLink(key="outer_le", source="learner", target="expert", feedback=True),
        ),
        answer="learner",
    ),
    Style(
        name="deliberation",
        paradigm="deliberation",
        prefix="Deliberation",
        agents=_agents(reflector="Qwen3.5-4B", toolcaller="Qwen3.5-4B"),
        links=(
            ReleasedLink(key="outer_rt", source="reflector", target="toolcaller"),
            ReleasedLink(key="outer_tr", source="toolcaller", target="reflector", feedback=True),
        ),
        answer="toolcaller",
    ),
)

STYLES: Final[Mapping[str, Style]] = {style.name: style for style in _STYLES}


def check_task(task: str) -> None:
    """Refuse a name of a task that cannot be part of a file's name.

    Raises:
        RecmasError: RM506.
    """
    if _TASK.fullmatch(task) is None:
        hint = "Use letters, digits, `-` and `_`."
        raise fail("RM506", f"{show(task)} is no name of a task", hint=hint)


def style_named(name: str) -> Style:
    """Return a style.

    Raises:
        RecmasError: RM506 for a style that does not exist.
    """
    if name not in STYLES:
        hint = did_you_mean(name, STYLES)
        raise fail("RM506", f"there is no released style `{name}`", hint=hint)
    return STYLES[name]
