"""A link's tensors: read from and written to `.pt` files, without ever running what is in them."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recmas_compiler.links.files import LinkHeader, misfit
from recmas_compiler.links.modules import link_widths
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.link_kinds import LinkKind, LinkRole, kind_of_tensors

# Released files add a few kilobytes of pickle and padding to their tensors.
_LARGEST_OVERHEAD_BYTES: Final = 1 << 20
_DTYPES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}


@dataclass(frozen=True, kw_only=True)
class ReleasedTensors:
    """A link's kind, and its tensors by name in the element types of their file."""

    kind: LinkKind
    tensors: dict[str, Tensor]


def read_pickled_link(
    path: Path,
    role: LinkRole,
    *,
    kind: LinkKind | None,
    in_dim: int | None,
    out_dim: int | None,
) -> ReleasedTensors:
    """Read a released link: a plain state dict.

    Nothing in the file is executed: torch's restricted reader builds tensors and plain containers
    and refuses all else.

    Args:
        kind: What it must be; None if nothing tells but its tensors.
        in_dim: Width it must read; None if nothing tells.
        out_dim: Width it must write; None if nothing tells.

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
    found = kind or kind_of_tensors(state.keys(), role)
    tensors = _checked(path, state, role, found, in_dim=in_dim, out_dim=out_dim)
    return ReleasedTensors(kind=found, tensors=tensors)


def read_link_file(path: Path, role: LinkRole, kind: LinkKind) -> dict[str, Tensor]:
    """Read a safetensors file with a link of a kind, whatever its widths.

    Raises:
        RecmasError: RM208 if it is anything else.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _refusal(path, first_line(error)) from error
    return _checked(path, tensors, role, kind, in_dim=None, out_dim=None)


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
    kind: LinkKind,
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
        kind,
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
