"""Link files: safetensors with the released tensor names, and a note of what they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recmas_compiler.ir.ops import LinkKind, LinkWeights
from recmas_compiler.links.link_file import (
    LinkFileError,
    LinkHeader,
    link_kind,
    misfit,
    read_link_header,
)
from recmas_compiler.links.modules import LINKS, Role, make_link
from recmas_compiler.spec.document.places import UNKNOWN, SourcePosition
from recmas_runtime.core.errors import RecmasError, fail


def save_link(
    path: Path, link: nn.Module, *, source: str | None = None, target: str | None = None
) -> None:
    """Write a link's weights in float32.

    Args:
        path: The safetensors file.
        link: From `make_link`.
        source: Identity of the backbone it reads from; with it, the file refuses others.
        target: Identity of the backbone it writes for.
    """
    kind = next(kind for (kind, _), form in LINKS.items() if type(link) is form)
    tensors = {
        name: weight.detach().to("cpu", torch.float32).contiguous()
        for name, weight in link.state_dict().items()
    }
    save_link_tensors(path, tensors, kind=kind, source=source, target=target)


def save_link_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: LinkKind,
    source: str | None = None,
    target: str | None = None,
) -> None:
    """Write a link's weights as they are, in their own element types.

    Args:
        path: The safetensors file.
        tensors: All of the link's, contiguous, none sharing memory.
        kind: Form of the link.
        source: Identity of the backbone it reads from; with it, the file refuses others.
        target: Identity of the backbone it writes for.
    """
    metadata = {
        "kind": kind,
        "in_dim": str(tensors["proj1.weight"].shape[1]),
        "out_dim": str(tensors["proj2.weight"].shape[0]),
        **{k: v for k, v in (("source", source), ("target", target)) if v is not None},
    }
    save_file(dict(tensors), path, metadata=metadata)


def load_link(path: Path) -> nn.Module:
    """Load a link of whatever kind and widths the file holds, in float32.

    Raises:
        RecmasError: RM120 if the file is no complete link, or holds NaN or infinity.
    """
    refusal = _Refusal(path, UNKNOWN)
    try:
        header = read_link_header(path)
        role = _role(header)
        kind = link_kind(header, role)
        proj1, proj2 = header.shapes.get("proj1.weight"), header.shapes.get("proj2.weight")
        if proj1 is None or proj2 is None or len(proj1) != 2 or len(proj2) != 2:
            raise LinkFileError("it has no matrices `proj1.weight` and `proj2.weight`")
    except LinkFileError as error:
        raise refusal(str(error)) from error
    weights = LinkWeights(
        kind=kind, init="random", file=str(path), in_dim=proj1[1], out_dim=proj2[0]
    )
    return _load(weights, role, path, header, refusal)


def load_declared_link(
    weights: LinkWeights, role: Role, *, source: str, target: str, where: SourcePosition
) -> nn.Module:
    """Load the file that a spec names for a link, and refuse it if it was made for another.

    Files of others may lack the metadata; then the names and shapes of their tensors decide.

    Args:
        weights: What the spec declares; `weights.file` is the file.
        role: Inner or outer.
        source: Identity of the backbone that the link reads from.
        target: Identity of the backbone that the link writes for.
        where: Place in the spec that errors point to.

    Raises:
        RecmasError: RM120 if the file does not fit.
    """
    assert weights.file is not None, "the link has no file"
    path = Path(weights.file)
    refusal = _Refusal(path, where)
    try:
        header = read_link_header(path)
    except LinkFileError as error:
        raise refusal(str(error)) from error
    kind = header.metadata.get("kind", weights.kind)
    if kind != weights.kind:
        raise refusal(f"it is of kind {kind!r}, the spec says {weights.kind!r}")
    for key, identity in (("source", source), ("target", target)):
        made_for = header.metadata.get(key, identity)
        if made_for != identity:
            raise refusal(f"its {key} is the backbone {made_for!r}, here it is {identity!r}")
    return _load(weights, role, path, header, refusal)


class _Refusal:
    """Makes the error that names the file and the place in the spec."""

    def __init__(self, path: Path, where: SourcePosition) -> None:
        self._path = path
        self._where = where

    def __call__(self, reason: str) -> RecmasError:
        message = f"link file {self._path} cannot be used: {reason}"
        hint = "Use a link that was made for these backbones, or `init: aligned`."
        if self._where == UNKNOWN:
            return fail("RM120", message, hint=hint)
        where = self._where
        return fail(
            "RM120", message, hint=hint, file=where.file, line=where.line, column=where.column
        )


def _role(header: LinkHeader) -> Role:
    names = {name.partition(".")[0] for name in header.shapes}
    if names & {"ln_source", "ln_target"}:
        return "outer"
    # Without norms, only an outer link has W3.
    return "outer" if "residual_proj" in names and "pre_ln" not in names else "inner"


def _load(
    weights: LinkWeights, role: Role, path: Path, header: LinkHeader, refusal: _Refusal
) -> nn.Module:
    reason = misfit(header, weights.kind, role, in_dim=weights.in_dim, out_dim=weights.out_dim)
    if reason is not None:
        raise refusal(reason)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise refusal(str(error)) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise refusal(f"`{name}` holds NaN or infinity")
    link = make_link(weights.kind, role, weights.in_dim, weights.out_dim)
    link.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return link
