"""Trained links beside a spec: whether they fit, and the spec with them and without them.

`recmasc train` writes a folder with one file per link and a receipt with the hash of each. Nothing
here loads a weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from recmas_compiler.links.files import (
    End,
    LinkFileError,
    fitting_kind,
    link_kind,
    read_link_header,
)
from recmas_compiler.spec.document.places import Loc, is_file, path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import WeightsSection
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.formats.ids import inner_link_id, link_ends, link_file_name, outer_link_id
from recmas_runtime.formats.link_kinds import LinkKind, LinkRole

RECEIPT_NAME: Final = "receipt.json"
RECEIPT_VERSION: Final = 1
LINKS_FOLDER: Final = "links"
# Larger than any receipt: a few hundred bytes per link and measurement.
_MAX_RECEIPT_BYTES: Final = 16 * 2**20

Change = Callable[[str, LinkRole, Loc, WeightsSection], Mapping[str, Any]]
"""Says what becomes of a link: its id, role, place and settings to the settings that change."""


@dataclass(frozen=True, kw_only=True)
class TrainedLinks:
    """The trained links that a spec can use.

    Attributes:
        spec: The spec with the files of these links as their weights, and with a warning RM751 for
            every one that does not fit any more.
        used: Ids of the links that learned, in order of declaration.
        untrained: Ids of the links that lie there as they started: no stage has trained them yet.
    """

    spec: Spec
    folder: Path
    used: tuple[str, ...]
    untrained: tuple[str, ...]


def links_folder(spec: Spec) -> Path | None:
    """Return the folder that a spec's trained links go to; None for a spec without `train`."""
    train = spec.document.train
    return None if train is None else path_of(_setting(spec), spec.base_dir)


def has_trained_links(spec: Spec) -> bool:
    """Tell whether trained links lie beside a spec, whether they fit or not."""
    return _folder_and_receipt(spec) is not None


def find_trained_links(spec: Spec, ends: Mapping[str, End]) -> TrainedLinks | None:
    """Return the trained links that lie beside a spec; None if nothing was trained.

    Args:
        ends: What each agent's backbone is.
    """
    found = _folder_and_receipt(spec)
    if found is None:
        return None
    folder, receipt = found
    digests, entries = verified_digests(receipt), receipt.get("links", {})
    used: list[str] = []
    untrained: list[str] = []
    warnings: list[Problem] = []
    outdated: set[Problem] = set()

    def use_trained(
        link_id: str, role: LinkRole, loc: Loc, section: WeightsSection
    ) -> Mapping[str, Any]:
        file = folder / link_file_name(link_id)
        if link_id not in digests:
            return {}
        source, target = (ends[agent] for agent in link_ends(link_id))
        why = _why_unfit(file, digests[link_id], role, section, source=source, target=target)
        if why is not None:
            message = f"the trained link `{file}` is ignored: {why}."
            hint = "Train it anew, or delete it."
            place = spec.position(*loc[:2])
            warnings.append(problem_at(place, "RM751", message, hint=hint, severity="warning"))
            return {}
        entry = entries[link_id]
        if entry.get("trained"):
            used.append(link_id)
        elif entry.get("start") != "file":  # the spec's own files were trained elsewhere
            untrained.append(link_id)
        outdated.update(_warnings_about_start(spec, loc))
        return {"init": None, "weights": f"{_setting(spec)}/{file.name}"}

    changed = _with_links(spec, use_trained)
    return TrainedLinks(
        spec=replace(
            changed,
            warnings=(*(w for w in spec.warnings if w not in outdated), *warnings),
        ),
        folder=folder,
        used=tuple(used),
        untrained=tuple(untrained),
    )


def _folder_and_receipt(spec: Spec) -> tuple[Path, dict[str, Any]] | None:
    folder = links_folder(spec)
    receipt = None if folder is None else read_receipt(folder / RECEIPT_NAME)
    return None if folder is None or receipt is None else (folder, receipt)


def read_receipt(path: Path) -> dict[str, Any] | None:
    """Return a training receipt; None if there is none, or none of this version."""
    if not is_file(path) or path.stat().st_size > _MAX_RECEIPT_BYTES:
        return None
    try:
        receipt = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return None
    is_receipt = isinstance(receipt, dict) and receipt.get("receipt") == RECEIPT_VERSION
    return receipt if is_receipt else None


def verified_digests(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 that a receipt gives for each link's file, by link id."""
    entries = receipt.get("links")
    if not isinstance(entries, dict):
        return {}
    return {
        str(link_id): str(entry["sha256"])
        for link_id, entry in entries.items()
        if isinstance(entry, dict) and "sha256" in entry
    }


def _warnings_about_start(spec: Spec, loc: Loc) -> list[Problem]:
    """Return what was said about the start of a link, which trained weights make void."""
    place = problem_at(spec.places.key((*loc, "init")), "RM152", "")
    where = (place.file, place.line, place.column)
    return [
        warning
        for warning in spec.warnings
        if warning.code == place.code and (warning.file, warning.line, warning.column) == where
    ]


def _setting(spec: Spec) -> str:
    train = spec.document.train
    assert train is not None, "only a spec with `train` has trained links"
    return train.links_dir or f"{LINKS_FOLDER}/{spec.document.name}"


def _why_unfit(
    file: Path, digest: str, role: LinkRole, section: WeightsSection, *, source: End, target: End
) -> str | None:
    """Return why a trained link does not fit the spec, or None if it does."""
    try:
        header = read_link_header(file)
        if sha256_of(file) != digest:
            return "its hash is not the one in its receipt"
        fitting_kind(header, role, kind=section.kind, source=source, target=target)
    except LinkFileError as error:
        return str(error)
    return None


KindOf = Callable[[str, LinkRole, Loc, WeightsSection], LinkKind]
"""Says of which kind a link with trained weights is."""


def untrained_links(spec: Spec, *, kinds: Mapping[str, str] | None = None) -> Spec:
    """Return the spec with every trained link set back to its start, everything else as it is.

    The start is the closed form, as for a link that was never trained.

    Args:
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

    def start(link_id: str, role: LinkRole, loc: Loc, section: WeightsSection) -> Mapping[str, Any]:
        if section.weights is None:
            return {}
        return {"kind": kind_of(link_id, role, loc, section), "init": "aligned", "weights": None}

    return _with_links(spec, start)


def _with_links(spec: Spec, change: Change) -> Spec:
    """Return the spec with changed settings of its links, in order of declaration."""
    document = spec.document
    agents = {}
    for name, agent in document.agents.items():
        update = change(inner_link_id(name), "inner", ("agents", name, "inner"), agent.inner)
        agents[name] = agent.model_copy(update={"inner": agent.inner.model_copy(update=update)})
    links = {
        name: link.model_copy(
            update=change(outer_link_id(*link_ends(name)), "outer", ("links", name), link)
        )
        for name, link in document.links.items()
    }
    return replace(spec, document=document.model_copy(update={"agents": agents, "links": links}))


def _kind_in_file(spec: Spec, role: LinkRole, loc: Loc, section: WeightsSection) -> LinkKind:
    assert section.weights is not None, "only a link with a file has its kind in there"
    try:
        return link_kind(read_link_header(path_of(section.weights, spec.base_dir)), role)
    except LinkFileError as error:
        message = f"the link file `{section.weights}` does not tell its kind: {error}."
        hint = "Correct the path, which is relative to the spec, or write the link's `kind`."
        place = spec.position(*loc, "weights")
        raise RecmasError(problem_at(place, "RM120", message, hint=hint)) from error
