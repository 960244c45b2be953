"""Which file holds which link: the two JSON files of the released form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from recmas_compiler.released.styles import INNER_CONFIG, OUTER_CONFIG, OUTER_TYPE, Style
from recmas_compiler.spec.document.places import is_file
from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.core.errors import RecmasError, fail

_LARGEST_CONFIG_BYTES: Final = 1 << 20
_ADAPTER: Final = "adapter.pt"
_COMPLETE: Final = "Download the repository again, or give another one."


@dataclass(frozen=True, kw_only=True)
class OuterFile:
    """Where an outer link is.

    Attributes:
        path: The `.pt` file.
        in_dim: Width it reads, where the config says so.
        out_dim: Width it writes, where the config says so.
    """

    path: Path
    in_dim: int | None
    out_dim: int | None


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
        form = entry.get("adapter_type", OUTER_TYPE)
        if form != OUTER_TYPE:
            raise _malformed(path, f"`{key}` is of the form {show(form)}, not `{OUTER_TYPE}`")
        found[link.key] = OuterFile(
            path=_existing(repository, entry.get("filename"), path),
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
