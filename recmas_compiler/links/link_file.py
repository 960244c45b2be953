"""What a link file says about itself, read from its header without loading any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from recmas_compiler.spec.schema.sections import LinkKind
from recmas_runtime.core.errors import RecmasError

Role = Literal["inner", "outer"]

_DTYPES: Final = frozenset({"F32", "F16", "BF16", "F64"})


class LinkFileError(Exception):
    """A link file that cannot be used; the text says why."""


@dataclass(frozen=True, kw_only=True)
class LinkHeader:
    """The header of a safetensors file.

    Attributes:
        shapes: Shape by tensor name.
        dtypes: Element type by tensor name, as safetensors writes it.
        metadata: As stored; files made by others may have none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def link_shapes(
    kind: LinkKind, role: Role, *, in_dim: int, out_dim: int
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a link, in torch's `[out, in]` layout."""
    is_inner = role == "inner"
    hidden = 2 * out_dim if kind == "ln_residual" and not is_inner else out_dim
    has_bias = kind != "residual"
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, dim: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (dim,)

    def linear(name: str, out: int, in_: int) -> None:
        shapes[f"{name}.weight"] = (out, in_)
        if has_bias:
            shapes[f"{name}.bias"] = (out,)

    if kind != "residual":
        norm("pre_ln" if is_inner else "ln_source", in_dim)
    linear("proj1", hidden, in_dim)
    linear("proj2", out_dim, hidden)
    if kind == "projected" or not is_inner:
        linear("residual_proj", out_dim, in_dim)
    if kind == "ln_residual":
        norm("post_ln" if is_inner else "ln_target", out_dim)
    return shapes


def read_link_header(path: Path) -> LinkHeader:
    """Read the header of a safetensors file.

    Raises:
        LinkFileError: There is no such file, or it is not safetensors.
    """
    # It imports numpy, which only specs that name link files should wait for.
    from recmas_runtime.formats.safetensors_file import read_header

    if not path.exists():
        raise LinkFileError("there is no such file")
    try:
        header = read_header(path)
    except RecmasError as error:
        (problem,) = error.problems
        what = "it cannot be read" if problem.code == "RM401" else "it is not a safetensors file"
        raise LinkFileError(f"{what}: {problem.message}") from error
    return LinkHeader(
        shapes={name: entry.shape for name, entry in header.tensors.items()},
        dtypes={name: entry.dtype for name, entry in header.tensors.items()},
        metadata=header.metadata,
    )


def link_kind(header: LinkHeader, role: Role) -> LinkKind:
    """Return the kind of a link: what its metadata says, or else what its tensors show.

    Raises:
        LinkFileError: Its metadata names a kind that does not exist.
    """
    match header.metadata.get("kind"):
        case "residual":
            return "residual"
        case "ln_residual":
            return "ln_residual"
        case "projected":
            return "projected"
        case None:
            after, before = ("post_ln", "pre_ln") if role == "inner" else ("ln_target", "ln_source")
            if f"{after}.weight" in header.shapes:
                return "ln_residual"
            return "projected" if f"{before}.weight" in header.shapes else "residual"
        case unknown:
            raise LinkFileError(f"its metadata names the kind `{unknown}`, which does not exist")


def misfit(
    header: LinkHeader, kind: LinkKind, role: Role, *, in_dim: int, out_dim: int
) -> str | None:
    """Return why a link file does not fit between the given widths, or None if it does."""
    for key, needed in (("in_dim", in_dim), ("out_dim", out_dim)):
        said = header.metadata.get(key, str(needed))
        if said != str(needed):
            return f"its {key} is {said}, but {needed} is needed"
    expected = link_shapes(kind, role, in_dim=in_dim, out_dim=out_dim)
    for name in expected:
        if name not in header.shapes:
            return f"it has no tensor `{name}`, which {kind} {role} links have"
    for name, shape in header.shapes.items():
        if name not in expected:
            return f"it has a tensor `{name}`, which {kind} {role} links do not have"
        if shape != expected[name]:
            return f"`{name}` is {list(shape)}, but {list(expected[name])} is needed"
        if header.dtypes[name] not in _DTYPES:
            return f"`{name}` is stored as {header.dtypes[name]}, not as floating-point numbers"
    return None
