"""A file with the prompts of a team whose own files have none: YAML, by names of agents.

Each is a text, or a mapping of `system`, `prompt` and `expected`. `{topic}` and `{{ topic }}` are
places for fields, and names of other agents places for their messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from recmas_compiler.importers.source_files import Node, TeamFiles, unknown
from recmas_compiler.importers.team import TeamAgent
from recmas_compiler.importers.texts import EITHER_BRACES, Resolve, parse_text
from recmas_compiler.spec.document.places import SourcePosition

_PARTS: Final = dict.fromkeys(("system", "prompt", "expected"))


@dataclass
class Prompts:
    """A file of prompts, by names of agents; the form of our own for teams that have none."""

    root: Node | None
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path | None) -> Prompts:
        """Return the prompts of a file; none if there is no file."""
        return cls(None if path is None else TeamFiles(path.parent).open(path))

    def agent(
        self, key: str, name: str, *, resolve: Resolve, place: SourcePosition
    ) -> TeamAgent | None:
        """Return the agent that the file describes under `key`; None if it has no such key."""
        found = None if self.root is None else self.root.get(key)
        if found is None:
            return None
        self.used.add(key)
        if isinstance(found.value, str):
            texts = {"prompt": found.text()}
        else:
            texts = {part: node.text() for part, node in found.mapping().items()}
        for part in texts:
            if part not in ("system", "prompt", "expected"):
                raise unknown(found, "text of a prompt", part, _PARTS)
        parsed = {part: parse_text(text, EITHER_BRACES, resolve) for part, text in texts.items()}
        return TeamAgent(
            name=name,
            places=(place, found.place),
            system=parsed.get("system", ()),
            task=parsed.get("prompt", ()),
            expected=parsed.get("expected", ()),
        )

    def check_used(self, known: Mapping[str, object]) -> None:
        """Refuse prompts for agents that are not there."""
        for key, node in {} if self.root is None else self.root.mapping().items():
            if key not in self.used:
                raise unknown(node, "agent of the team", key, known)

    @property
    def file(self) -> tuple[str, ...]:
        """The file, if there is one."""
        return () if self.root is None else (self.root.file,)

    @property
    def num_carried(self) -> int:
        """How many of its keys were carried over: all, for others are refused."""
        return 0 if self.root is None else self.root.files.account({})[0]
