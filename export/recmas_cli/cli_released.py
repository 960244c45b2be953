"""`recmasc import` and `recmasc export-links`: systems that others trained, in and out."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import Outcome, RichProgress, command
from recmas_cli.options import QUIET, SPEC
from recmas_compiler.released.styles import DEFAULT_TASK, ORGANISATION
from recmas_runtime.core.progress import Silent


@click.group("import")
def import_() -> None:
    """Turn systems that others trained into specs."""


@import_.command("released")
@click.argument("style")
@click.option("--from", "origin", metavar="FOLDER|hf", help="Where the repositories are.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("spec.yaml"))
@click.option("--task", default=DEFAULT_TASK, show_default=True, help="Whose links to take.")
@click.option("--agent", "agents", multiple=True, metavar="ROLE=FOLDER", help="One repository.")
@click.option("--outer", type=click.Path(path_type=Path), help="Repository of the outer links.")
@click.option("--org", default=ORGANISATION, show_default=True, help="Owner, with --from hf.")
@click.option("--revision", default="main", show_default=True, help="With --from hf.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@QUIET
@command
def import_released(
    style: str,
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
    from recmas_cli.released_commands import import_released as run_import

    return run_import(
        style,
        origin=origin,
        out=out,
        task=task,
        agents=agents,
        outer=outer,
        organisation=org,
        revision=revision,
        force=force,
        progress=Silent() if quiet else RichProgress(),
    )


@click.command("export-links")
@SPEC
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--style", required=True, help="As of `recmasc import released`.")
@click.option("--task", default=DEFAULT_TASK, show_default=True, help="What the links are for.")
@click.option("--with-models", is_flag=True, help="Copy the models' files too.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@command
def export_links(
    spec: Path, out: Path, style: str, task: str, *, with_models: bool, force: bool
) -> Outcome:
    """Write a system's trained links in the form of the released ones."""
    from recmas_cli.released_commands import export_links as run_export

    return run_export(
        spec, style_name=style, out=out, task=task, with_models=with_models, force=force
    )
