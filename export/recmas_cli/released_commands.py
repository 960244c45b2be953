"""The commands `recmasc import released` and `recmasc export-links`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from recmas_cli.console import Outcome
from recmas_compiler.released.export_system import export_system
from recmas_compiler.released.import_system import import_system, link_files
from recmas_compiler.released.placing import check_free
from recmas_compiler.released.repositories import fetch_repositories, find_repositories
from recmas_compiler.released.styles import style_named
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import fail
from recmas_runtime.core.progress import Progress

HUB: Final = "hf"


def import_released(
    style_name: str,
    *,
    origin: str | None,
    out: Path,
    task: str,
    agents: Sequence[str],
    outer: Path | None,
    organisation: str,
    revision: str,
    force: bool,
    progress: Progress,
) -> Outcome:
    """Turn a released system into a spec and links."""
    style = style_named(style_name)
    named = _named_agents(agents)
    # Said again when it is written; said now, before anything is fetched.
    check_free(out.parent, [*link_files(style).values(), out.name], force=force)
    if origin == HUB:
        with progress.stage(f"fetching links of {style.name}"):
            repositories = fetch_repositories(
                style, organisation=organisation, revision=revision, agents=named, outer=outer
            )
    else:
        folder = None if origin is None else Path(origin)
        repositories = find_repositories(style, folder=folder, agents=named, outer=outer)
    with progress.stage(f"reading links of {style.name}"):
        imported = import_system(style, repositories, task=task, out=out, force=force)
    return Outcome(
        text=f"Wrote {out} and {len(imported.links)} links beside it.\n"
        f"Next: recmasc check {out}, then recmasc build {out}.",
        data={
            "path": str(out),
            "style": style.name,
            "task": task,
            "links": [str(path) for path in imported.links],
            "repositories": {
                **{role: repository.name for role, repository in repositories.agents.items()},
                "outer": repositories.outer.name,
            },
        },
        problems=imported.warnings,
    )


def export_links(
    path: Path, *, style_name: str, out: Path, task: str, with_models: bool, force: bool
) -> Outcome:
    """Write a spec's links in the released form."""
    style = style_named(style_name)
    spec = load_spec(path)
    folders = export_system(spec, style, task=task, out=out, with_models=with_models, force=force)
    listed = "".join(f"  {folder.name}\n" for folder in folders)
    return Outcome(
        text=f"Wrote {len(folders)} repositories into {out}:\n{listed}",
        data={
            "path": str(out),
            "style": style.name,
            "task": task,
            "repositories": [str(folder) for folder in folders],
        },
        problems=spec.warnings,
    )


def _named_agents(arguments: Sequence[str]) -> Mapping[str, Path]:
    """Return the folders given as ROLE=FOLDER."""
    named: dict[str, Path] = {}
    for argument in arguments:
        role, separator, folder = argument.partition("=")
        if not (role and separator and folder):
            hint = "Write it as ROLE=FOLDER, such as `--agent planner=downloads/planner`."
            raise fail("RM506", f"`--agent {argument}` names no folder", hint=hint)
        if role in named:
            raise fail("RM506", f"`--agent {role}` is given twice", hint="Give it once.")
        named[role] = Path(folder)
    return named
