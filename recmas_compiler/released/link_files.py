"""The files of released links: the JSON files that name them, and the tensors in them.

Nothing in a `.pt` file is ever run: torch's restricted reader builds tensors and plain containers
and refuses all else.
"""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recmas_compiler.links.files import LinkHeader, misfit
from recmas_compiler.links.modules import link_widths
from recmas_compiler.released.styles import INNER_CONFIG, OUTER_CONFIG, OUTER_TYPE, Style
from recmas_compiler.spec.document.places import is_file
from recmas_compiler.spec.document.problems import did_you_mean, show
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.link_kinds import RELEASED_KIND, LinkRole

_LARGEST_CONFIG_BYTES: Final = 1 << 20
_ADAPTER: Final = "adapter.pt"
_COMPLETE: Final = "Download the repository again, or give another one."


@dataclass(frozen=True, kw_only=True)
class OuterFile:
    """Where an outer link is.

    Attributes:
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


# Released files add a few kilobytes of pickle and padding to their tensors.
_LARGEST_OVERHEAD_BYTES: Final = 1 << 20
_DTYPES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}


def read_pickled_link(
    path: Path, role: LinkRole, *, in_dim: int | None, out_dim: int | None
) -> dict[str, Tensor]:
    """Read a released link: a plain state dict of an `ln_residual` link.

    Nothing in the file is executed: torch's restricted reader builds tensors and plain containers
    and refuses all else.

    Args:
        in_dim: Width it must read; None if nothing tells.
        out_dim: Width it must write; None if nothing tells.

    Returns:
        The tensors by name, in the element types of the file.

    Raises:
        RecmasError: RM208 for anything but the complete, finite tensors of such a link.
    """
    _check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # A hostile pickle can make the reader raise whatever it likes.
    except Exception as error:
        raise _refusal(path, f"it is not a plain state dict ({first_line(error)})") from error
    if type(state) not in (dict, OrderedDict):
        raise _refusal(path, f"it is not a plain state dict but a {type(state).__name__}")
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    return _checked(path, state, role, in_dim=in_dim, out_dim=out_dim)


def read_link_file(path: Path, role: LinkRole) -> dict[str, Tensor]:
    """Read a safetensors file with an `ln_residual` link, whatever its widths.

    Raises:
        RecmasError: RM208 if it is anything else.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _refusal(path, first_line(error)) from error
    return _checked(path, tensors, role, in_dim=None, out_dim=None)


def write_pickled_link(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a link in the released form."""
    torch.save(dict(tensors), path)


def _check_archive(path: Path) -> None:
    """Refuse what could unpack to more than the file itself holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _refusal(path, "it is not a file of torch.save") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise _refusal(path, "it is packed, which files of torch.save are not")


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise _refusal(path, f"it is not a plain state dict: it has a key {name!r}")
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = type(tensor).__name__
        raise _refusal(path, f"it is not a plain state dict: `{name}` is a {kind}, not a tensor")
    assert isinstance(tensor, Tensor), "its type was checked"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise _refusal(path, f"`{name}` is no plain tensor in memory")
    if tensor.dtype not in _DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise _refusal(path, f"`{name}` is stored as {dtype}, not as floating-point numbers")


def _checked(
    path: Path,
    tensors: Mapping[str, Tensor],
    role: LinkRole,
    *,
    in_dim: int | None,
    out_dim: int | None,
) -> dict[str, Tensor]:
    """Return the tensors on their own memory, after refusing what is no such link."""
    for name in ("proj1.weight", "proj2.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise _refusal(path, f"it has no matrix `{name}`")
    widths = link_widths(tensors)
    # Shapes first: a tensor of the right shape cannot need more memory than the link does.
    header = LinkHeader(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: _DTYPES.get(tensor.dtype, "other") for name, tensor in tensors.items()},
        metadata={},
    )
    why = misfit(
        header,
        RELEASED_KIND,
        role,
        in_dim=widths[0] if in_dim is None else in_dim,
        out_dim=widths[1] if out_dim is None else out_dim,
    )
    if why is not None:
        raise _refusal(path, why)
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size_bytes > path.stat().st_size or path.stat().st_size > (
        size_bytes + _LARGEST_OVERHEAD_BYTES
    ):
        raise _refusal(path, "its size is not that of its tensors")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise _refusal(path, f"`{name}` holds NaN or infinity")
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _refusal(path: Path, why: str) -> RecmasError:
    hint = "Get the file again from where it was released."
    return fail("RM208", f"{path.name} cannot be used: {why}", file=str(path), hint=hint)
