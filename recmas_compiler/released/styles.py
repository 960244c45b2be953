"""The released styles, as `styles.yaml` lists them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.core.errors import fail

ORGANISATION: Final = "RecursiveMAS"
DEFAULT_TASK: Final = "math"
_TASK: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

INNER_CONFIG: Final = "innerlink_config.json"
OUTER_CONFIG: Final = "outerlink_config.json"


class ReleasedAgent(Struct, frozen=True, forbid_unknown_fields=True):
    """An agent of a style.

    Attributes:
        model: The released model's name, as the repository's name ends.
    """

    role: str
    model: str

    @property
    def title(self) -> str:
        """Its name in repositories."""
        return self.role.capitalize()


class ReleasedLink(Struct, frozen=True, forbid_unknown_fields=True):
    """An outer link of a style.

    Attributes:
        key: Its name in `outerlink_config.json`, there called `legacy_key`.
    """

    key: str
    source: str
    target: str
    feedback: bool = False


class Style(Struct, frozen=True, forbid_unknown_fields=True):
    """A released arrangement of agents.

    Attributes:
        paradigm: Arrangement; styles of one paradigm differ in their models only.
        prefix: How the names of its repositories begin.
        agents: In order of their turns.
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


STYLES: Final[Mapping[str, Style]] = {
    style.name: style
    for style in msgspec.yaml.decode(
        Path(__file__).with_name("styles.yaml").read_bytes(), type=list[Style]
    )
}


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
