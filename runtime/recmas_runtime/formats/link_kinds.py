"""The kinds of links: THE table. All that depends on a link's kind follows from its row here.

Every link is a case of one form, which has W1 and W2 always and the rest as its row says:

    y = post?( S x + W2 gelu(W1 pre?(x) + b1?) + b2? )        S x is x itself, or W3 x + b3?

Norms are layer norms with scale and bias. The last one may be an RMS norm, which has a scale and
nothing else: with the same number everywhere it gives every result one length. GELU is exact (erf).
Tensors have the released names, where there are any; those of linear layers are [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

LinkKind = Literal["residual", "biased_residual", "ln_residual", "projected", "rescaled"]
LinkInit = Literal["aligned", "latentmas", "random"]
LinkRole = Literal["inner", "outer"]

DEFAULT_KIND: Final[LinkKind] = "projected"
DEFAULT_INIT: Final[LinkInit] = "aligned"
# The links of the published weights, what their trainer makes unasked, and those of the paper.
RELEASED_KIND: Final[LinkKind] = "ln_residual"
TRAINER_KIND: Final[LinkKind] = "biased_residual"
PAPER_KIND: Final[LinkKind] = "residual"
# That of LatentMAS (arXiv:2511.20639): a matrix, and results of one length.
LATENTMAS_KIND: Final[LinkKind] = "rescaled"

NORM_EPSILON: Final = 1e-5  # of the mean square

PROJ1: Final = "proj1"  # W1
PROJ2: Final = "proj2"  # W2
SKIP: Final = "residual_proj"  # W3
# Names of the norms before and after, by role.
_NORMS: Final[Mapping[LinkRole, tuple[str, str]]] = {
    "inner": ("pre_ln", "post_ln"),
    "outer": ("ln_source", "ln_target"),
}
_RMS_NORMS: Final[Mapping[LinkRole, str]] = {"inner": "post_rms", "outer": "rms_target"}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """What a kind says.

    Attributes:
        inner_skip: What an inner link adds its branch to: its input, or a matrix of it. Widths of
            outer links differ, so those have the matrix always.
        outer_hidden: Hidden width of outer links, in output widths; that of inner links is one.
    """

    pre_norm: bool = False
    post_norm: Literal["layer", "rms"] | None = None
    biases: bool = True
    inner_skip: Literal["identity", "matrix"] = "identity"
    outer_hidden: int = 1


_KINDS: Final[Mapping[LinkKind, _Row]] = {
    # The paper's.
    "residual": _Row(biases=False),
    # What the released trainer makes unless it is told otherwise.
    "biased_residual": _Row(),
    # That of the released weights.
    "ln_residual": _Row(pre_norm=True, post_norm="layer", outer_hidden=2),
    # For new links: it can be any affine map, which is what the closed form solves for.
    "projected": _Row(pre_norm=True, inner_skip="matrix"),
    # A matrix, and results of one length.
    "rescaled": _Row(biases=False, inner_skip="matrix", post_norm="rms"),
}


@dataclass(frozen=True, kw_only=True)
class LinkForm:
    """What links of one kind and role are made of.

    Their norms are named `pre` and `post`, None for none; `post` is an RMS norm where it does not
    centre. With a skip matrix S is W3, not the identity.
    """

    pre: str | None
    post: str | None
    post_centres: bool
    has_skip_matrix: bool
    has_biases: bool
    hidden_per_out: int

    def hidden_dim(self, out_dim: int) -> int:
        """Return the width between W1 and W2."""
        return self.hidden_per_out * out_dim

    def layers(self, in_dim: int, out_dim: int) -> dict[str, tuple[int, int]]:
        """Return the linear layers with their widths, output first."""
        hidden = self.hidden_dim(out_dim)
        layers = {PROJ1: (hidden, in_dim), PROJ2: (out_dim, hidden)}
        return layers | ({SKIP: (out_dim, in_dim)} if self.has_skip_matrix else {})

    def shapes(self, in_dim: int, out_dim: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor, in the order of their use."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.pre is not None:
            shapes |= {f"{self.pre}.weight": (in_dim,), f"{self.pre}.bias": (in_dim,)}
        for name, shape in self.layers(in_dim, out_dim).items():
            shapes[f"{name}.weight"] = shape
            if self.has_biases:
                shapes[f"{name}.bias"] = shape[:1]
        if self.post is not None:
            shapes[f"{self.post}.weight"] = (out_dim,)
            if self.post_centres:
                shapes[f"{self.post}.bias"] = (out_dim,)
        return shapes

    def num_parameters(self, in_dim: int, out_dim: int) -> int:
        """Return how many numbers a link holds."""
        return sum(math.prod(shape) for shape in self.shapes(in_dim, out_dim).values())


def _form(kind: LinkKind, role: LinkRole) -> LinkForm:
    row, (pre, post) = _KINDS[kind], _NORMS[role]
    return LinkForm(
        pre=pre if row.pre_norm else None,
        post={None: None, "layer": post, "rms": _RMS_NORMS[role]}[row.post_norm],
        post_centres=row.post_norm == "layer",
        has_skip_matrix=role == "outer" or row.inner_skip == "matrix",
        has_biases=row.biases,
        hidden_per_out=row.outer_hidden if role == "outer" else 1,
    )


# (kind, role) -> form. The keys are text, for files may name kinds that do not exist.
FORMS: Final[Mapping[tuple[str, str], LinkForm]] = MappingProxyType(
    {(kind, role): _form(kind, role) for kind in _KINDS for role in get_args(LinkRole)}
)


def kind_named(name: str) -> LinkKind | None:
    """Return the kind of this name, or None if there is none."""
    return next((kind for kind in _KINDS if kind == name), None)


def kind_of_tensors(names: Set[str], role: LinkRole) -> LinkKind:
    """Return the kind whose tensors are nearest to these names.

    Norms count first, the output's before the input's: they tell more than biases do of what a file
    that fits no kind was meant to be.
    """
    pre, post = _NORMS[role]
    posts = [name for name in (post, _RMS_NORMS[role]) if f"{name}.weight" in names]

    def distance(kind: LinkKind) -> tuple[bool, bool, int]:
        form = FORMS[kind, role]
        return (
            posts != [form.post] if form.post is not None else bool(posts),
            (form.pre is None) == (f"{pre}.weight" in names),
            len(form.shapes(1, 1).keys() ^ names),
        )

    return min(_KINDS, key=distance)
