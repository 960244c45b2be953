"""Trained links beside a spec: whether they fit, and the spec with them and without them.

`recmasc train` writes a folder with one file per link and a receipt with the hash of each. Nothing
here loads a weight.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec

from recmas_compiler.links.files import (
    End,
    LinkFileError,
    fitting_kind,
    link_kind,
    read_link_header,
)
from recmas_compiler.links.link_set import RECEIPT_NAME, finish_replacing
from recmas_compiler.spec.document.places import Loc, is_file, path_of
from recmas_compiler.spec.document.problems import problem_at, show
from recmas_compiler.spec.schema.sections import WeightsSection
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import open_regular, sha256_of
from recmas_runtime.core.text import first_line, listed
from recmas_runtime.formats.ids import inner_link_id, link_ends, link_file_name, outer_link_id
from recmas_runtime.formats.link_kinds import LinkKind, LinkRole

RECEIPT_VERSION: Final = 1
LINKS_FOLDER: Final = "links"
# Larger than any receipt: a few hundred bytes per link and measurement.
_MAX_RECEIPT_BYTES: Final = 16 * 2**20
_DIGEST: Final = "sha256 "
_TEMPLATE: Final = "the chat template of "

Change = Callable[[str, LinkRole, Loc, WeightsSection], Mapping[str, Any]]
"""Says what becomes of a link: its id, role, place and settings to the settings that change."""


@dataclass(frozen=True, kw_only=True)
class TrainedLinks:
    """The trained links that a spec can use.

    Attributes:
        spec: The spec with the files of these links as their weights, and with warnings: RM751 for
            every one that does not fit any more, RM756 if they learned with another system, RM757
            if their receipt cannot be read.
        used: Ids of the links that learned, in order of declaration.
        untrained: Ids of the links that lie there as they started: no stage has trained them yet.
        held_out: After the last outer stage: nats per token of held-out answers, by what the answer
            agent's slots got (`latent`, `shuffled`, `null`, `mean`). Empty without that stage.
    """

    spec: Spec
    folder: Path
    used: tuple[str, ...]
    untrained: tuple[str, ...]
    held_out: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What a build takes, as a line; empty for nothing."""
        if not self.used:
            return ""
        return f"A build takes trained links from {self.folder}: {', '.join(self.used)}.\n"


def links_folder(spec: Spec) -> Path | None:
    """Return the folder that a spec's trained links go to; None for a spec without `train`."""
    train = spec.document.train
    return None if train is None else path_of(_setting(spec), spec.base_dir)


def has_trained_links(spec: Spec) -> bool:
    """Tell whether trained links lie beside a spec, whether they fit or not."""
    folder = links_folder(spec)
    if folder is None:
        return False
    try:
        finish_replacing(folder)
        return read_receipt(folder / RECEIPT_NAME) is not None
    except (ReceiptError, OSError):
        return True  # there, and not to be used


def find_trained_links(
    spec: Spec, ends: Mapping[str, End], *, templates: Mapping[str, str]
) -> TrainedLinks | None:
    """Return the trained links that lie beside a spec; None if nothing was trained.

    Args:
        ends: What each agent's backbone is.
        templates: By backbone: the digest of its chat template, where that is known.
    """
    folder = links_folder(spec)
    if folder is None:
        return None
    warnings: list[Problem] = []
    receipt = None
    try:
        finish_replacing(folder)  # a training may have been killed at its very end
        receipt = read_receipt(folder / RECEIPT_NAME)
        if receipt is None and (there := _own_link_files(spec, folder)):
            raise ReceiptError(f"there is none beside {listed(there)}")
    except (ReceiptError, OSError) as error:
        warnings.append(_without_receipt(spec, folder, error))
    if receipt is None and not warnings:
        return None
    entries = {} if receipt is None else receipt.links
    used: list[str] = []
    untrained: list[str] = []
    outdated: set[Problem] = set()

    def use_trained(
        link_id: str, role: LinkRole, loc: Loc, section: WeightsSection
    ) -> Mapping[str, Any]:
        file = folder / link_file_name(link_id)
        source, target = (ends[agent] for agent in link_ends(link_id))
        if link_id in entries:
            digest = entries[link_id].sha256
            why = _why_unfit(file, digest, role, section, source=source, target=target)
        elif receipt is None or section.weights is not None or not is_file(file):
            return {}  # it was never trained
        else:
            why = "its receipt does not name it"
        if why is not None:
            message = f"the trained link `{file}` is ignored: {why}."
            hint = "Train it anew, or delete it."
            place = spec.position(*loc[:2])
            warnings.append(problem_at(place, "RM751", message, hint=hint, severity="warning"))
            return {}
        entry = entries[link_id]
        if entry.trained:
            used.append(link_id)
        elif entry.start != "file":  # the spec's own files were trained elsewhere
            untrained.append(link_id)
        outdated.update(_warnings_about_start(spec, loc))
        return {"init": None, "weights": f"{_setting(spec)}/{file.name}"}

    changed = _with_links(spec, use_trained)
    if receipt is not None and used:
        now = learned_with(spec, templates)
        warnings += _learned_otherwise(spec, folder, then=receipt.learned_with, now=now)
    return TrainedLinks(
        spec=replace(
            changed,
            warnings=(*(w for w in spec.warnings if w not in outdated), *warnings),
        ),
        folder=folder,
        used=tuple(used),
        untrained=tuple(untrained),
        held_out={} if receipt is None or not used else receipt.held_out,
    )


class LinkEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a receipt says of one link.

    Attributes:
        start: Where its weights came from before it learned.
        trained: Whether it learned.
    """

    sha256: str
    start: str = ""
    trained: bool = False


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a receipt; the rest is for people.

    Attributes:
        learned_with: What the links were trained in, as `learned_with` gives it; older receipts do
            not say.
        stages: The figures of each stage.
    """

    receipt: Literal[1]
    links: dict[str, LinkEntry]
    learned_with: dict[str, str] = {}
    stages: dict[str, dict[str, Any]] = {}

    @property
    def held_out(self) -> dict[str, float]:
        """The losses on held-out records after the outer stage, if there was one."""
        after = self.stages.get("outer", {}).get("after")
        figures = after.items() if isinstance(after, dict) else ()
        return {name: value for name, value in figures if isinstance(value, float)}


class ReceiptError(Exception):
    """A receipt that is there and cannot be read; the text says why."""


def read_receipt(path: Path) -> Receipt | None:
    """Return a training receipt, or None if there is none.

    Raises:
        ReceiptError: It is there, but cannot be read.
    """
    if not os.path.lexists(path):
        return None
    try:
        with open_regular(path, file=path.name) as stream:
            raw = stream.read(_MAX_RECEIPT_BYTES + 1)
        if len(raw) > _MAX_RECEIPT_BYTES:
            raise ReceiptError("it is larger than any receipt")
        values = json.loads(raw)
        if isinstance(values, dict) and values.get("receipt", 1) != RECEIPT_VERSION:
            raise ReceiptError(f"it is of version {show(values['receipt'])}")
        return msgspec.convert(values, Receipt)
    except RecmasError as error:
        raise ReceiptError(error.problems[0].message) from error
    except RecursionError:
        raise ReceiptError("it is nested too deeply") from None
    except (ValueError, OSError) as error:  # msgspec's errors are ValueErrors
        raise ReceiptError(first_line(error)) from error


def learned_with(spec: Spec, templates: Mapping[str, str]) -> dict[str, str]:
    """Return what links learn in, by name: prompts and the form of the system.

    Values that are too long to show are digests. Links fit another system as well, but what they
    learned was for this one.

    Args:
        templates: By backbone: the digest of its chat template, where that is known.
    """
    document = spec.document
    found = {"the rounds": str(document.rounds), "the answer agent": document.answer.agent}
    found["the date"] = str(document.date or "that of the day")
    for name, digest in templates.items():
        found[f"{_TEMPLATE}`{name}`"] = f"{_DIGEST}{digest[:16]}"
    for name, agent in document.agents.items():
        prompts = agent.model_dump(mode="json", include={"system", "prompt", "chat_template"})
        text = json.dumps(prompts, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
        steps = document.latent_steps if agent.latent_steps is None else agent.latent_steps
        found[f"the prompt of `{name}`"] = f"{_DIGEST}{digest[:16]}"
        found[f"the latent steps of `{name}`"] = str(steps)
    arrows = sorted(outer_link_id(*link_ends(name)) for name in document.links)
    return {**found, "the links": ", ".join(arrows)}


def _learned_otherwise(
    spec: Spec, folder: Path, *, then: Mapping[str, str], now: Mapping[str, str]
) -> list[Problem]:
    if not then:
        return []
    both = then.keys() & now.keys()
    other = [
        name
        for name in dict.fromkeys((*then, *now))
        # Templates are not always at hand.
        if then.get(name) != now.get(name) and (name in both or not name.startswith(_TEMPLATE))
    ]
    if not other:
        return []

    def told(name: str) -> str:
        values = [values.get(name) for values in (then, now)]
        if any(value is None or value.startswith(_DIGEST) for value in values):
            return name
        return f"{name} ({values[0]} then, {values[1]} now)"

    message = f"the trained links in {folder} learned in another system: other are "
    message += f"{listed(map(told, other))}."
    agent = next((n for n in spec.document.agents if f"the prompt of `{n}`" in other), None)
    place = spec.position("agents", agent, "prompt") if agent else spec.position("train")
    hint = "Train anew, or set it back; `--untrained-links` builds without them."
    return [problem_at(place, "RM756", message, hint=hint, severity="warning")]


def _own_link_files(spec: Spec, folder: Path) -> list[str]:
    """Return the names of link files that training would have written, and no link names itself."""
    document = spec.document
    sections: dict[str, WeightsSection] = {
        **{inner_link_id(name): agent.inner for name, agent in document.agents.items()},
        **{outer_link_id(*link_ends(name)): link for name, link in document.links.items()},
    }
    return [
        name
        for link_id, section in sections.items()
        if section.weights is None and is_file(folder / (name := link_file_name(link_id)))
    ]


def _without_receipt(spec: Spec, folder: Path, error: Exception) -> Problem:
    why = error.strerror if isinstance(error, OSError) and error.strerror else error
    message = f"the trained links in {folder} are not used: their {RECEIPT_NAME} cannot be read: "
    hint = "Go on with `recmasc train --resume`, train anew, or delete the folder."
    place = spec.position("train", "links_dir")
    return problem_at(place, "RM757", f"{message}{why}.", hint=hint, severity="warning")


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
    except RecmasError as error:
        return error.problems[0].message
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
