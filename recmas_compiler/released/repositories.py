"""Where a released system's repositories are: sub-folders, folders named one by one, or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recmas_compiler.backbones.sources import hub_snapshot
from recmas_compiler.released.styles import OUTER_CONFIG, Style
from recmas_compiler.spec.document.places import is_file, is_folder
from recmas_compiler.spec.document.problems import did_you_mean
from recmas_runtime.core.errors import fail

# All that an import reads. The models' weights are fetched when the spec is built.
_HUB_FILES: Final = ("*.json", "*.pt")
_OUTER: Final = "outer links"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A released repository on this machine.

    Attributes:
        name: Its released name, or its folder's.
        folder: Where its files are.
        hub: `hf:ORG/NAME@COMMIT` if it is the hub's, else None.
    """

    name: str
    folder: Path
    hub: str | None = None

    @property
    def location(self) -> str:
        """How it is named as a backbone from anywhere."""
        return self.hub or str(self.folder.resolve())

    def source(self, base_dir: Path) -> str:
        """Return how a spec in `base_dir` names it as a backbone."""
        if self.hub is not None:
            return self.hub
        relative = os.path.relpath(self.folder.resolve(), base_dir.resolve())
        # A folder may be called like a source of another form: `hf:x`, `~`.
        return relative if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)  # noqa: PTH118


@dataclass(frozen=True, kw_only=True)
class Repositories:
    """The repositories of one system.

    Attributes:
        agents: By role, in the style's order.
        outer: The outer links.
    """

    agents: Mapping[str, Repository]
    outer: Repository


def find_repositories(
    style: Style, *, folder: Path | None, agents: Mapping[str, Path], outer: Path | None
) -> Repositories:
    """Find a system's repositories on this disk.

    Args:
        style: What to look for.
        folder: Holds them as sub-folders whose names begin as the released ones do; None if all
            are named one by one.
        agents: Folders by role, instead of what `folder` holds.
        outer: Folder of the outer links, instead of what `folder` holds.

    Raises:
        RecmasError: RM207 if one is missing or incomplete, or several could be meant; RM506 for a
            role that the style does not have.
    """
    named = _named(style, agents, outer)
    wanted = {role for role in (*_roles(style), _OUTER) if role not in named}
    found = named | (_search(style, folder, wanted) if wanted else {})
    for role in _roles(style):
        if not is_file(found[role] / "config.json"):
            hint = "Give the whole repository: the model with its links."
            raise fail("RM207", "there is no config.json", file=str(found[role]), hint=hint)
    if not is_file(found[_OUTER] / OUTER_CONFIG):
        hint = "Give the repository of the outer links."
        raise fail("RM207", f"there is no {OUTER_CONFIG}", file=str(found[_OUTER]), hint=hint)
    local = {role: Repository(name=path.name, folder=path) for role, path in found.items()}
    return Repositories(agents={r: local[r] for r in _roles(style)}, outer=local[_OUTER])


def fetch_repositories(
    style: Style,
    *,
    organisation: str,
    revision: str,
    agents: Mapping[str, Path],
    outer: Path | None,
) -> Repositories:
    """Find a system's repositories in the Hugging Face cache; fetch what is missing.

    Only configs and links are fetched.

    Args:
        style: What to look for; repositories have their released names.
        organisation: Owner on the hub.
        revision: Branch, tag or commit of every repository.
        agents: Folders by role, instead of the hub's.
        outer: Folder of the outer links, instead of the hub's.

    Raises:
        RecmasError: RM200 if the hub has no such repository or cannot be reached, RM202 if it is
            gated, RM207 as `find_repositories`.
    """
    named = _named(style, agents, outer)
    names = {role: style.agent_repository(role) for role in _roles(style)}
    names[_OUTER] = style.outer_repository
    folders = dict(named)
    hub: dict[str, str] = {}
    for role, name in names.items():
        if role not in named:
            repository = f"{organisation}/{name}"
            folders[role] = hub_snapshot(repository, revision, download=True, files=_HUB_FILES)
            # The cache names the folder after the commit that the revision stands for.
            hub[role] = f"hf:{repository}@{folders[role].name}"
    local = find_repositories(
        style, folder=None, agents={r: folders[r] for r in _roles(style)}, outer=folders[_OUTER]
    )
    found = {**local.agents, _OUTER: local.outer}
    known = {
        role: Repository(name=names[role], folder=repository.folder, hub=hub[role])
        if role in hub
        else repository
        for role, repository in found.items()
    }
    return Repositories(agents={r: known[r] for r in _roles(style)}, outer=known[_OUTER])


def _roles(style: Style) -> list[str]:
    return [agent.role for agent in style.agents]


def _named(style: Style, agents: Mapping[str, Path], outer: Path | None) -> dict[str, Path]:
    """Return the folders that the user named, which must exist."""
    for role in agents:
        if role not in _roles(style):
            hint = did_you_mean(role, _roles(style))
            raise fail("RM506", f"{style.name} has no agent `{role}`", hint=hint)
    named = {**agents, **({} if outer is None else {_OUTER: outer})}
    for path in named.values():
        if not is_folder(path):
            raise fail("RM207", "there is no such folder", file=str(path), hint="Check the path.")
    return named


def _search(style: Style, folder: Path | None, wanted: set[str]) -> dict[str, Path]:
    """Return the sub-folder of every wanted part, by the beginning of its name."""
    if folder is None or not is_folder(folder):
        hint = "Give the folder that holds the repositories, or `--from hf`."
        what = "no folder is given" if folder is None else "there is no such folder"
        raise fail("RM207", what, file=None if folder is None else str(folder), hint=hint)
    patterns = {
        agent.role: f"{style.prefix}-{agent.title}"
        for agent in style.agents
        if agent.role in wanted
    }
    if _OUTER in wanted:
        patterns[_OUTER] = style.outer_repository
    children = sorted(path for path in folder.iterdir() if path.is_dir())
    matches = {role: [p for p in children if _begins(p.name, n)] for role, n in patterns.items()}
    if all(len(paths) == 1 for paths in matches.values()):
        return {role: paths[0] for role, paths in matches.items()}
    findings = []
    for role, paths in matches.items():
        released = patterns[role] if role == _OUTER else style.agent_repository(role)
        if not paths:
            findings.append(f"no repository of the {role} (released as `{released}`)")
        elif len(paths) > 1:
            several = ", ".join(f"`{path.name}`" for path in paths)
            findings.append(f"several repositories that could be the {role}: {several}")
    held = ", ".join(f"`{path.name}`" for path in children) or "no folders"
    raise fail(
        "RM207",
        f"there is {'; '.join(findings)}. It holds {held}",
        file=str(folder),
        hint="Download what is missing, or say which is which with `--agent ROLE=FOLDER` and "
        "`--outer FOLDER`.",
    )


def _begins(name: str, released: str) -> bool:
    return re.fullmatch(rf"{re.escape(released)}(-.+)?", name, re.IGNORECASE) is not None
