"""Links as torch modules: made, drawn at random, saved to files and loaded from them.

Shapes: h is [..., in_dim], the result [..., out_dim].
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import gelu

from recmas_compiler.links.files import (
    End,
    LinkFileError,
    LinkWeights,
    fitting_kind,
    read_link_header,
)
from recmas_compiler.spec.document.places import SourcePosition
from recmas_compiler.spec.document.problems import problem_at
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import write_whole
from recmas_runtime.formats.link_kinds import FORMS, NORM_EPSILON, LinkKind, LinkRole


class LinkModule(nn.Module):
    """A link of any kind: post?(S h + W2 gelu(W1 pre?(h))), with the parts that its form has.

    Parameters have the released names, so a state dict is a checkpoint.
    """

    def __init__(self, kind: LinkKind, role: LinkRole, in_dim: int, out_dim: int) -> None:
        assert role == "outer" or in_dim == out_dim, "an inner link keeps the width"
        super().__init__()
        self.kind, self.role, self.form = kind, role, FORMS[kind, role]
        layers = {
            name: nn.Linear(inputs, outputs, bias=self.form.has_biases)
            for name, (outputs, inputs) in self.form.layers(in_dim, out_dim).items()
        }
        # Random starts and optimizers go through the parts in this order.
        if self.form.pre is not None:
            self.add_module(self.form.pre, nn.LayerNorm(in_dim, eps=NORM_EPSILON))
        self.proj1, self.proj2 = layers["proj1"], layers["proj2"]
        self.residual_proj = layers.get("residual_proj")
        if self.form.post is not None:
            norm = nn.LayerNorm if self.form.post_centres else nn.RMSNorm
            self.add_module(self.form.post, norm(out_dim, eps=NORM_EPSILON))

    @property
    def pre_norm(self) -> nn.LayerNorm | None:
        """The norm of what W1 reads."""
        norm: nn.LayerNorm | None = self._norm(self.form.pre)
        return norm

    @property
    def post_norm(self) -> nn.LayerNorm | nn.RMSNorm | None:
        """The norm of the sum."""
        norm: nn.LayerNorm | nn.RMSNorm | None = self._norm(self.form.post)
        return norm

    @property
    def offset(self) -> nn.Parameter | None:
        """What is added last to whatever the link gives; None without biases."""
        last = self.proj2 if self.post_norm is None else self.post_norm
        return None if isinstance(last, nn.RMSNorm) else last.bias

    def _norm(self, name: str | None) -> Any:
        return None if name is None else getattr(self, name)

    def branch(self, h: Tensor) -> Tensor:
        """Return the hidden units, gelu(W1 pre?(h))."""
        normed = h if self.pre_norm is None else self.pre_norm(h)
        return gelu(self.proj1(normed))

    def unnormed(self, h: Tensor) -> Tensor:
        """Return the sum before the last norm, S h + W2 gelu(W1 pre?(h))."""
        straight = h if self.residual_proj is None else self.residual_proj(h)
        y: Tensor = straight + self.proj2(self.branch(h))
        return y

    def forward(self, h: Tensor) -> Tensor:
        """Map hidden states or input embeddings to input embeddings of the target."""
        y = self.unnormed(h)
        return y if self.post_norm is None else self.post_norm(y)


def make_link(kind: LinkKind, role: LinkRole, in_dim: int, out_dim: int) -> LinkModule:
    """Return a new link in float32; its weights are torch's defaults until they are set."""
    return LinkModule(kind, role, in_dim, out_dim)


def randomize(link: nn.Module, *, link_id: str, seed: int = 0) -> None:
    """Draw a link's matrices and biases anew, uniformly within 1 / sqrt(inputs).

    Args:
        link: Changed in place; norms stay neutral.
        link_id: Equal ids and seeds give equal weights, whatever else was drawn before.
    """
    draw = seeded_generator(f"{seed}:{link_id}")
    with torch.no_grad():
        for module in link.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    parameter.copy_((torch.rand(parameter.shape, generator=draw) * 2 - 1) * bound)


def seeded_generator(name: str) -> torch.Generator:
    """Return a random generator that depends on `name` only."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def save_link(
    path: Path, link: nn.Module, *, source: str | None = None, target: str | None = None
) -> None:
    """Write a link's weights in float32.

    Args:
        source: Identity of the backbone it reads from; with it, the file refuses others.
        target: Identity of the backbone it writes for.
    """
    assert isinstance(link, LinkModule), "only links have a kind"
    tensors = {
        name: weight.detach().to("cpu", torch.float32).contiguous()
        for name, weight in link.state_dict().items()
    }
    save_link_tensors(path, tensors, kind=link.kind, source=source, target=target)


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
        tensors: All of the link's, contiguous, none sharing memory.
        source: Identity of the backbone it reads from; with it, the file refuses others.
        target: Identity of the backbone it writes for.
    """
    in_dim, out_dim = link_widths(tensors)
    metadata = {
        "kind": kind,
        "in_dim": str(in_dim),
        "out_dim": str(out_dim),
        **{k: v for k, v in (("source", source), ("target", target)) if v is not None},
    }
    write_whole(path, in_order(save(dict(tensors), metadata=metadata)))


def in_order(content: bytes) -> bytes:
    """Return a safetensors file with its header sorted: equal tensors give equal bytes.

    The library writes metadata in the random order of a hash map.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def link_widths(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the widths that a link reads and writes."""
    return tensors["proj1.weight"].shape[1], tensors["proj2.weight"].shape[0]


def load_declared_link(
    weights: LinkWeights, role: LinkRole, *, source: End, target: End, where: SourcePosition
) -> LinkModule:
    """Load the file that a spec names for a link, and refuse it if it was made for another.

    Raises:
        RecmasError: RM120 if the file does not fit.
    """
    assert weights.file is not None, "the link has no file"
    path = Path(weights.file)
    try:
        header = read_link_header(path)
        fitting_kind(header, role, kind=weights.kind, source=source, target=target)
        return load_link(path, weights.kind, role, weights.in_dim, weights.out_dim)
    except LinkFileError as error:
        message = f"link file {path} cannot be used: {error}"
        raise RecmasError(problem_at(where, "RM120", message, hint=error.hint)) from error


def load_link(path: Path, kind: LinkKind, role: LinkRole, in_dim: int, out_dim: int) -> LinkModule:
    """Load a link in float32 from a file whose header is known to fit.

    Raises:
        LinkFileError: The file cannot be read, or holds NaN or infinity.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LinkFileError(str(error)) from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise LinkFileError(f"`{name}` holds NaN or infinity")
    link = make_link(kind, role, in_dim, out_dim)
    link.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    return link
