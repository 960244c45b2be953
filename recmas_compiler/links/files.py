"""Link files without their weights: where weights come from, what a file's header says, its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.link_kinds import (
    FORMS,
    PAPER_KIND,
    TRAINER_KIND,
    LinkInit,
    LinkKind,
    LinkRole,
    kind_named,
    kind_of_tensors,
)

_DTYPES: Final = frozenset({"F32", "F16", "BF16", "F64"})

_HINT_BROKEN: Final = "Copy it again, or train the link anew."
_HINT_FOREIGN: Final = "Use a link that was made for these two backbones, or `init: aligned`."
_HINT_MOVED: Final = (
    "An older recmas wrote the backbone's folder into it. If it is the same model, put the folder "
    "back there; else train the link anew, or use `init: aligned`."
)
_HINT_KIND: Final = "Leave `kind` out: the file knows it."


class LinkFileError(Exception):
    """A link file that cannot be used; the text says why."""

    def __init__(self, why: str, *, hint: str = _HINT_BROKEN) -> None:
        super().__init__(why)
        self.hint = hint


class End(NamedTuple):
    """What a link needs to know of the backbone at one of its ends."""

    width: int
    identity: str
    folder: str | None = None

    def is_named(self, name: str) -> bool:
        """Tell whether a link file means this backbone; older ones name a folder by its path."""
        return name in (self.identity, self.folder)

    def told(self, other: str) -> str:
        """Return what to call this backbone beside another one's name in a message."""
        if self.folder is None:
            return f"`{self.identity}`"
        digest = f" (`{self.identity}`)" if other.startswith("folder:") else ""
        return f"`{self.folder}`{digest}"


def end_of(facts: BackboneFacts) -> End:
    """Return what links need to know of a backbone."""
    return End(width=facts.width, identity=facts.identity, folder=facts.folder)


@dataclass(frozen=True, kw_only=True)
class LinkWeights:
    """Where a link's weights come from: a closed-form or random start, or a file.

    Attributes:
        init: Used when there is no file.
        file: Absolute path of a safetensors file, or None.
        in_dim: Width of what it reads.
        out_dim: Width of what it writes.
    """

    kind: LinkKind
    init: LinkInit
    file: str | None
    in_dim: int
    out_dim: int

    def num_parameters(self, role: LinkRole) -> int:
        """Return how many parameters the link has."""
        return FORMS[self.kind, role].num_parameters(self.in_dim, self.out_dim)


@dataclass(frozen=True, kw_only=True)
class LinkHeader:
    """The header of a safetensors file.

    Attributes:
        dtypes: Element type by tensor name, as safetensors writes it.
        metadata: As stored; files made by others may have none.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def read_link_header(path: Path) -> LinkHeader:
    """Read the header of a safetensors file.

    Raises:
        LinkFileError: There is no such file, or it is not safetensors.
    """
    # It imports numpy, which only specs that name link files should wait for.
    from recmas_runtime.formats.safetensors_file import read_header

    try:
        if not path.exists():
            raise LinkFileError("there is no such file")
        header = read_header(path)
    except OSError as error:  # such as a name that is too long
        raise LinkFileError(f"it cannot be read: {error.strerror or error}") from error
    except RecmasError as error:
        (problem,) = error.problems
        what = "it cannot be read" if problem.code == "RM401" else "it is not a safetensors file"
        raise LinkFileError(f"{what}: {problem.message}") from error
    return LinkHeader(
        shapes={name: entry.shape for name, entry in header.tensors.items()},
        dtypes={name: entry.dtype for name, entry in header.tensors.items()},
        metadata=header.metadata,
    )


def link_kind(header: LinkHeader, role: LinkRole) -> LinkKind:
    """Return the kind of a link: what its metadata says, or else what its tensors show.

    Raises:
        LinkFileError: Its metadata names a kind that does not exist.
    """
    said = header.metadata.get("kind")
    if said is None:
        return kind_of_tensors(header.shapes.keys(), role)
    kind = kind_named(said)
    if kind is None:
        raise LinkFileError(f"its metadata names the kind `{said}`, which does not exist")
    return kind


def fitting_kind(
    header: LinkHeader, role: LinkRole, *, kind: LinkKind | None, source: End, target: End
) -> LinkKind:
    """Return the kind of a link that can stand between two backbones.

    Files of others may lack the metadata; then the names and shapes of their tensors decide.

    Args:
        kind: The kind that it has to be; None for any. A `residual` link may have biases.

    Raises:
        LinkFileError: It is of another kind, does not fit, or was made for another backbone.
    """
    found = link_kind(header, role)
    # The trainer's form is the paper's with biases: `residual` takes both.
    is_biased_residual = (kind, found) == (PAPER_KIND, TRAINER_KIND)
    if kind not in (None, found) and not is_biased_residual:
        raise LinkFileError(f"it is of kind `{found}`, not `{kind}`", hint=_HINT_KIND)
    why = misfit(header, found, role, in_dim=source.width, out_dim=target.width)
    if why is not None:
        raise LinkFileError(why, hint=_HINT_FOREIGN)
    for end, backbone in (("source", source), ("target", target)):
        made_for = header.metadata.get(end, backbone.identity)
        if not backbone.is_named(made_for):
            why = f"it was made for the {end} `{made_for}`, but this is {backbone.told(made_for)}"
            raise LinkFileError(why, hint=_HINT_MOVED if made_for[:1] == "/" else _HINT_FOREIGN)
    return found


def misfit(
    header: LinkHeader, kind: LinkKind, role: LinkRole, *, in_dim: int, out_dim: int
) -> str | None:
    """Return why a link file does not fit between the given widths, or None if it does."""
    for key, needed in (("in_dim", in_dim), ("out_dim", out_dim)):
        said = header.metadata.get(key, str(needed))
        if said != str(needed):
            return f"its {key} is {said}, but {needed} is needed"
    expected = FORMS[kind, role].shapes(in_dim, out_dim)
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
