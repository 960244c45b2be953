"""`recmasc import` and `recmasc export-links`: systems that others trained, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from recmas_cli.console import FILE, FOLDER, QUIET, SPEC, Outcome, command, shown_progress
from recmas_compiler.released.styles import DEFAULT_TASK, ORGANISATION, style_named
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import counted

HUB: Final = "hf"


@click.command("released", short_help="A released RecursiveMAS system.")
@click.argument("style_name", metavar="STYLE")
@click.option("--from", "origin", metavar="FOLDER|hf", help="Where the repositories are.")
@click.option(
    "-o",
    "--out",
    type=FILE,
    default=Path("spec.yaml"),
    show_default=True,
    help="The spec to write; link files land beside it.",
)
@click.option("--task", default=DEFAULT_TASK, show_default=True, help="Whose links to take.")
@click.option("--agent", "agents", multiple=True, metavar="ROLE=FOLDER", help="One repository.")
@click.option("--outer", type=FILE, help="Repository of the outer links.")
@click.option("--org", default=ORGANISATION, show_default=True, help="Owner, with --from hf.")
@click.option("--revision", default="main", show_default=True, help="With --from hf.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@QUIET
@command
def import_released(
    style_name: str,
    origin: str | None,
    out: Path,
    task: str,
    agents: tuple[str, ...],
    outer: Path | None,
    org: str,
    revision: str,
    *,
    force: bool,
    quiet: bool,
) -> Outcome:
    """Turn a released RecursiveMAS system into a spec and link files.

    STYLE is sequential_light, sequential_scaled, mixture, distillation or deliberation.
    """
    from recmas_compiler.released.import_system import import_system, link_files
    from recmas_compiler.released.repositories import fetch_repositories, find_repositories
    from recmas_runtime.core.files import check_free

    progress = shown_progress(quiet=quiet)
    style = style_named(style_name)
    named = _named_agents(agents)
    # Said again when it is written; said now, before anything is fetched.
    check_free(out.parent, [*link_files(style).values(), out.name], force=force)
    if origin == HUB:
        with progress.stage(f"fetching links of {style.name}"):
            repositories = fetch_repositories(
                style, organisation=org, revision=revision, agents=named, outer=outer
            )
    else:
        folder = None if origin is None else Path(origin)
        repositories = find_repositories(style, folder=folder, agents=named, outer=outer)
    with progress.stage(f"reading links of {style.name}"):
        imported = import_system(style, repositories, task=task, out=out, force=force)
    return Outcome(
        text=f"Wrote {out} and {counted(len(imported.links), 'link')} beside it.\n"
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


@click.command("export-links")
@SPEC
@click.option("-o", "--out", type=FOLDER, required=True, help="Folder of the repositories.")
@click.option("--style", "style_name", required=True, help="As of `recmasc import released`.")
@click.option("--task", default=DEFAULT_TASK, show_default=True, help="What the links are for.")
@click.option("--with-models", is_flag=True, help="Copy the models' files too.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@command
def export_links(
    spec: Path, out: Path, style_name: str, task: str, *, with_models: bool, force: bool
) -> Outcome:
    """Write a system's trained links in the form of the released ones."""
    from recmas_compiler.released.export_system import export_system

    style = style_named(style_name)
    loaded = load_spec(spec)
    folders = export_system(loaded, style, task=task, out=out, with_models=with_models, force=force)
    listed = "".join(f"  {folder.name}\n" for folder in folders)
    number = "1 repository" if len(folders) == 1 else f"{len(folders)} repositories"
    return Outcome(
        text=f"Wrote {number} into {out}:\n{listed}",
        data={
            "path": str(out),
            "style": style.name,
            "task": task,
            "repositories": [str(folder) for folder in folders],
        },
        problems=loaded.warnings,
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
