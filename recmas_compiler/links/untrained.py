"""The same system before it was trained: what a trained one is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

from recmas_compiler.links.files import LinkFileError, link_kind, read_link_header
from recmas_compiler.spec.document.places import Loc, path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import InnerSection, LinkSection, WeightsSection
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.ids import inner_link_id, link_ends, outer_link_id
from recmas_runtime.formats.link_kinds import LinkKind, LinkRole

Link = TypeVar("Link", InnerSection, LinkSection)

# Says of which kind a link with trained weights is: its id, its role, its place and its settings.
KindOf = Callable[[str, LinkRole, Loc, WeightsSection], LinkKind]


def untrained_links(spec: Spec, *, kinds: Mapping[str, str] | None = None) -> Spec:
    """Return the spec with every trained link set back to its start, everything else as it is.

    The start is the closed form, as for a link that was never trained.

    Args:
        spec: A checked spec.
        kinds: Kind by link id, where that is known without the links' files.

    Raises:
        RecmasError: RM508 if no link has trained weights, RM120 for a link file whose kind cannot
            be read.
    """

    def kind_of(link_id: str, role: LinkRole, loc: Loc, section: WeightsSection) -> LinkKind:
        known = section.kind or cast("LinkKind | None", (kinds or {}).get(link_id))
        return known or _kind_in_file(spec, role, loc, section)

    untrained = without_link_files(spec, kind_of)
    if untrained == spec:
        place = spec.position("links" if spec.document.links else "agents")
        message = "no link of this spec has trained weights, so there is nothing to set back."
        hint = "Give links `weights`, or compare with the other baselines."
        raise RecmasError(problem_at(place, "RM508", message, hint=hint))
    return untrained


def without_link_files(spec: Spec, kind_of: KindOf) -> Spec:
    """Return the spec with an untrained start in the place of every link's file."""
    document = spec.document
    agents = {
        name: agent.model_copy(
            update={
                "inner": _start(
                    agent.inner, inner_link_id(name), "inner", ("agents", name, "inner"), kind_of
                )
            }
        )
        for name, agent in document.agents.items()
    }
    links = {
        name: _start(link, outer_link_id(*link_ends(name)), "outer", ("links", name), kind_of)
        for name, link in document.links.items()
    }
    return replace(spec, document=document.model_copy(update={"agents": agents, "links": links}))


def _start(section: Link, link_id: str, role: LinkRole, loc: Loc, kind_of: KindOf) -> Link:
    if section.weights is None:
        return section
    kind = kind_of(link_id, role, loc, section)
    return section.model_copy(update={"kind": kind, "init": "aligned", "weights": None})


def _kind_in_file(spec: Spec, role: LinkRole, loc: Loc, section: WeightsSection) -> LinkKind:
    assert section.weights is not None, "only a link with a file has its kind in there"
    try:
        return link_kind(read_link_header(path_of(section.weights, spec.base_dir)), role)
    except LinkFileError as error:
        message = f"the link file `{section.weights}` does not tell its kind: {error}."
        hint = "Correct the path, which is relative to the spec, or write the link's `kind`."
        place = spec.position(*loc, "weights")
        raise RecmasError(problem_at(place, "RM120", message, hint=hint)) from error
