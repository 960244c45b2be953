"""The links that a stage starts from, kept in the run's folder.

Closed forms take minutes, and on another number of threads they differ in their last bits. So a run
that is gone on with reads what it began with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec
from torch import nn

from recmas_compiler.links.files import LinkFileError
from recmas_compiler.links.link_set import RECEIPT_NAME, finish_replacing, replaced_links
from recmas_compiler.links.modules import load_link, save_link
from recmas_compiler.lowering.materialize import MaterializedLink, declared_links
from recmas_compiler.training.loop.checkpoint import writing
from recmas_compiler.training.session import Session
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import open_regular, sha256_of, write_whole
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.ids import link_file_name

START: Final = "start"
_MAX_BYTES: Final = 2**24

Links = dict[str, MaterializedLink]


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    init: Literal["file", "aligned", "latentmas", "random"]


class _Starts(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside the links: which run they belong to, and the digest of each."""

    identity: dict[str, str]
    links: dict[str, _Start]


class _DamagedError(Exception):
    pass


def started(
    session: Session,
    stage: Path,
    make: Callable[[], Links],
    *,
    identity: Mapping[str, str],
    resume: bool,
) -> tuple[Links, tuple[Problem, ...]]:
    """Return the links that a stage starts from, as the graph has them now, and warnings.

    Args:
        stage: The stage's folder within the run's.
        make: Computes them, and gives them to the graph; not called where they are kept.
        identity: What the stage is made of; the links of another one are computed anew.

    Raises:
        RecmasError: RM303 if they cannot be written.
    """
    folder = stage / START
    warnings: tuple[Problem, ...] = ()
    if resume:
        try:
            found = _kept(session, folder, identity)
        except (_DamagedError, LinkFileError, OSError) as error:
            found, warnings = None, (_unreadable(folder, error),)
        if found is not None:
            for link_id, link in found.items():
                session.graph.link(link_id).load_state_dict(link.module.state_dict())
            return found, warnings
    links = make()
    if session.world.is_main:
        with writing(folder), replaced_links(folder) as staged:
            _write(staged, links, identity)
    session.world.wait()
    return links, warnings


def _write(staged: Path, links: Links, identity: Mapping[str, str]) -> None:
    entries = {}
    for link_id, link in links.items():
        path = staged / link_file_name(link_id)
        save_link(path, link.module, source=link.source, target=link.target)
        entries[link_id] = {"sha256": sha256_of(path), "init": link.init}
    text = json.dumps({"identity": dict(identity), "links": entries}, indent=1)
    write_whole(staged / RECEIPT_NAME, text + "\n")


def _kept(session: Session, folder: Path, identity: Mapping[str, str]) -> Links | None:
    """Return the links in a folder; None if there are none, or those of another run."""
    finish_replacing(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    kept = _read(folder / RECEIPT_NAME)
    if kept.identity != dict(identity):
        return None
    found: Links = {}
    for link_id, weights, role, ends, _ in declared_links(session.system):
        path = folder / link_file_name(link_id)
        entry = kept.links.get(link_id)
        if entry is None:
            raise _DamagedError(f"`{link_id}` is missing")
        try:
            digest = sha256_of(path)
        except RecmasError as error:
            raise _DamagedError(f"{path.name}: {error.problems[0].message}") from error
        if digest != entry.sha256:
            raise _DamagedError(f"{path.name} is not what was written")
        module: nn.Module = load_link(path, weights.kind, role, weights.in_dim, weights.out_dim)
        source, target = (session.backbone(agent).facts.identity for agent in ends)
        found[link_id] = MaterializedLink(
            module=module,
            weights=weights,
            role=role,
            source=source,
            target=target,
            init=entry.init,
        )
    return found


def _read(path: Path) -> _Starts:
    try:
        with open_regular(path, file=path.name) as stream:
            return msgspec.convert(json.loads(stream.read(_MAX_BYTES)), _Starts)
    except RecmasError as error:
        raise _DamagedError(error.problems[0].message) from error
    except (ValueError, RecursionError) as error:
        raise _DamagedError(first_line(error)) from error


def _unreadable(folder: Path, error: Exception) -> Problem:
    return Problem(
        code="RM753",
        severity="warning",
        message=f"the links that {folder} should hold cannot be read ({first_line(error)}); they "
        "are computed anew",
        hint="Those of a machine with another number of threads differ in their last bits.",
    )
