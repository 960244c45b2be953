"""A released system's repositories: where they are, and which file of them holds which link.

They are sub-folders of one folder, folders named one by one, or the hub's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from recmas_compiler.backbones.fetching.hub import hub_snapshot
from recmas_compiler.backbones.sources import ADAPTER_CONFIG
from recmas_compiler.released.forms import kind_of_form, unknown_form
from recmas_compiler.released.styles import INNER_CONFIG, OUTER_CONFIG, Style
from recmas_compiler.spec.document.places import is_file, is_folder
from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.link_kinds import LinkKind

# All that an import reads. The models' weights are fetched when the spec is built.
_HUB_FILES: Final = ("*.json", "*.pt")
_OUTER: Final = "outer links"

_LARGEST_CONFIG_BYTES: Final = 1 << 20
_ADAPTER: Final = "adapter.pt"
_COMPLETE: Final = "Download the repository again, or give another one."


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A released repository on this machine.

    Attributes:
        name: Its released name, or its folder's.
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
    """

    agents: Mapping[str, Repository]
    outer: Repository


def find_repositories(
    style: Style, *, folder: Path | None, agents: Mapping[str, Path], outer: Path | None
) -> Repositories:
    """Find a system's repositories on this disk.

    Args:
        folder: Holds them as sub-folders whose names begin as the released ones do; None if all
            are named one by one.

    Raises:
        RecmasError: RM207 if one is missing or incomplete, or several could be meant; RM506 for a
            role that the style does not have.
    """
    named = _named(style, agents, outer)
    wanted = {role for role in (*_roles(style), _OUTER) if role not in named}
    found = named | (_search(style, folder, wanted) if wanted else {})
    local = {role: Repository(name=path.name, folder=path) for role, path in found.items()}
    return _complete(style, local)


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

    Raises:
        RecmasError: RM200 if the hub has no such repository or cannot be reached, RM202 if it is
            gated, RM207 as `find_repositories`.
    """
    named = _named(style, agents, outer)
    found = {role: Repository(name=path.name, folder=path) for role, path in named.items()}
    names = {role: style.agent_repository(role) for role in _roles(style)}
    for role, name in {**names, _OUTER: style.outer_repository}.items():
        if role not in named:
            repository = f"{organisation}/{name}"
            folder = hub_snapshot(repository, revision, download=True, files=_HUB_FILES)
            # The cache names the folder after the commit that the revision stands for.
            hub = f"hf:{repository}@{folder.name}"
            found[role] = Repository(name=name, folder=folder, hub=hub)
    return _complete(style, found)


def _complete(style: Style, found: Mapping[str, Repository]) -> Repositories:
    """Return the repositories, after looking for the configs that all of them must have."""
    for role in _roles(style):
        if not is_file(found[role].folder / "config.json"):
            hint = "Give the whole repository: the model with its links."
            raise fail("RM207", "there is no config.json", file=str(found[role].folder), hint=hint)
    outer = found[_OUTER]
    if not is_file(outer.folder / OUTER_CONFIG):
        hint = "Give the repository of the outer links."
        raise fail("RM207", f"there is no {OUTER_CONFIG}", file=str(outer.folder), hint=hint)
    return Repositories(agents={role: found[role] for role in _roles(style)}, outer=outer)


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


@dataclass(frozen=True, kw_only=True)
class OuterFile:
    """Where an outer link is.

    Attributes:
        path: The `.pt` file.
        kind: What the config says it is; None if it does not.
        in_dim: Width it reads, where the config says so.
        out_dim: Width it writes, where the config says so.
    """

    path: Path
    kind: LinkKind | None
    in_dim: int | None
    out_dim: int | None


def inner_link_kind(repository: Path, task: str) -> LinkKind | None:
    """Return the kind that an agent's `adapter_config.json` says its inner link is, if it does.

    Raises:
        RecmasError: RM207 if a config that is named is missing, RM208 for a malformed config and
            for a form that recmas does not know.
    """
    named = _named_for_task(repository, task).get(ADAPTER_CONFIG, ADAPTER_CONFIG)
    path = repository / ADAPTER_CONFIG
    if named != ADAPTER_CONFIG:
        path = _existing(repository, named, repository / INNER_CONFIG)
    if not is_file(path):
        return None
    form = _load(path).get("adapter_type")
    kind = kind_of_form(form, "inner")
    if form is not None and kind is None:
        raise _malformed(path, f"the inner link {unknown_form(form, 'inner')}")
    return kind


def _named_for_task(repository: Path, task: str) -> dict[str, Any]:
    """Return the files that an agent's config names for a task; nothing where there is none."""
    path = repository / INNER_CONFIG
    if not is_file(path):
        return {}
    tasks = _object(_load(path).get("tasks", {}), "`tasks`", path)
    return _object(tasks[task], f"`tasks.{task}`", path) if task in tasks else {}


def inner_link_file(repository: Path, task: str) -> Path:
    """Return the file with an agent's inner link for a task.

    What the config names for the task, else `adapter(TASK).pt`, else `adapter.pt`: repositories
    with one link for all tasks have no config.

    Raises:
        RecmasError: RM207 if there is none, RM208 for a malformed config.
    """
    path = repository / INNER_CONFIG
    tasks: dict[str, Any] = {}
    if is_file(path):
        tasks = _object(_load(path).get("tasks", {}), "`tasks`", path)
    if task in tasks:
        named = _object(tasks[task], f"`tasks.{task}`", path).get(_ADAPTER, _ADAPTER)
        return _existing(repository, named, path)
    for name in (f"adapter({task}).pt", _ADAPTER):
        if is_file(repository / name):
            return repository / name
    message = f"there is no inner link for the task `{task}`"
    hint = f"Choose another --task. {did_you_mean(task, tasks)}" if tasks else _COMPLETE
    raise fail("RM207", message, file=str(repository), hint=hint.strip())


def outer_link_files(repository: Path, task: str, style: Style) -> dict[str, OuterFile]:
    """Return the files with a style's outer links for a task, by key in the style's order.

    Raises:
        RecmasError: RM207 if one is missing, RM208 for a malformed config, for unknown keys and
            for links of a form that recmas does not know.
    """
    path = repository / OUTER_CONFIG
    found: dict[str, OuterFile] = {}
    for entry in _adapters(_load(path), task, path):
        key = entry.get("legacy_key")
        link = next((link for link in style.links if link.key == key), None)
        if link is None:
            known = [link.key for link in style.links]
            message = f"{style.name} has no link {show(key)}"
            hint = did_you_mean(str(key), known)
            raise fail("RM208", message, file=str(path), hint=hint)
        if link.key in found:
            raise _malformed(path, f"it names `{key}` twice")
        form = entry.get("adapter_type")
        kind = kind_of_form(form, "outer")
        if form is not None and kind is None:
            raise _malformed(path, f"`{key}` {unknown_form(form, 'outer')}")
        found[link.key] = OuterFile(
            path=_existing(repository, entry.get("filename"), path),
            kind=kind,
            in_dim=_dimension(entry, "in_dim", path),
            out_dim=_dimension(entry, "out_dim", path),
        )
    missing = [link for link in style.links if link.key not in found]
    if missing:
        listed = ", ".join(f"`{k.key}` ({k.source} to {k.target})" for k in missing)
        raise fail("RM207", f"it names no file for {listed}", file=str(path), hint=_COMPLETE)
    return {link.key: found[link.key] for link in style.links}


def _adapters(config: dict[str, Any], task: str, path: Path) -> list[dict[str, Any]]:
    """Return the list of links, which stands at the top or under a task."""
    where = config
    if "tasks" in config:
        tasks = _object(config["tasks"], "`tasks`", path)
        if task not in tasks:
            message = f"there are no outer links for the task `{task}`"
            hint = f"Choose another --task. {did_you_mean(task, tasks)}"
            raise fail("RM207", message, file=str(path), hint=hint)
        where = _object(tasks[task], f"`tasks.{task}`", path)
    adapters = where.get("adapters")
    if not isinstance(adapters, list):
        raise _malformed(path, "`adapters` is not a list")
    return [_object(entry, f"`adapters[{i}]`", path) for i, entry in enumerate(adapters)]


def _load(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST_CONFIG_BYTES + 1)
        if len(raw) > _LARGEST_CONFIG_BYTES:
            raise _malformed(path, f"it is larger than {_LARGEST_CONFIG_BYTES} bytes")
        config = json.loads(raw)
    except OSError as error:
        message = f"it cannot be read: {error.strerror or error}"
        raise fail("RM207", message, file=str(path), hint="Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"it is not JSON ({error})") from error
    return _object(config, "it", path)


def _object(value: object, what: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(path, f"{what} is not a JSON object")
    return value


def _dimension(entry: dict[str, Any], key: str, path: Path) -> int | None:
    value = entry.get(key)
    if value is not None and (type(value) is not int or value <= 0):
        raise _malformed(path, f"`{key}` is {show(value)}")
    return value


def _existing(repository: Path, name: object, config: Path) -> Path:
    """Return a file that a config names; only plain names in the same folder are followed."""
    if not isinstance(name, str) or not _is_plain(name):
        raise _malformed(config, f"{show(name)} is not the name of a file beside it")
    if not is_file(repository / name):
        message = f"there is no file {show(name)}, which {config.name} names"
        raise fail("RM207", message, file=str(repository), hint=_COMPLETE)
    return repository / name


def _is_plain(name: str) -> bool:
    """Tell whether a name has no folder, drive or parent in it on any system."""
    return name == PurePosixPath(name).name == PureWindowsPath(name).name != ".."


def _malformed(path: Path, why: str) -> RecmasError:
    return fail("RM208", f"{path.name} cannot be used: {why}", file=str(path), hint=_COMPLETE)
