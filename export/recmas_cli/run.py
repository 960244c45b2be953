"""`recmasc run`: a bundle, or a spec that is built first."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from recmas_cli.console import FILE, shown_progress
from recmas_cli.printing import report
from recmas_compiler.api import build_bundle, load_and_compile, with_trained_links
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.manifest import MANIFEST_NAME


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("source", type=FILE)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(source: Path, arguments: tuple[str, ...]) -> None:
    """Run a SPEC (built first into out/NAME if need be) or a bundle.

    ARGUMENTS are those of `recmas run`; `recmas run --help` lists them.
    """
    sys.exit(_run(source, arguments))


def _run(source: Path, arguments: Sequence[str]) -> int:
    """Return the exit status of `recmas run`, or of a build that failed."""
    from recmas_runtime.cli.main import check_run
    from recmas_runtime.cli.main import main as runtime_main

    bundle = source
    # Not by pathlib, which raises for names that no system takes.
    if not os.path.isfile(source / MANIFEST_NAME):  # noqa: PTH113
        try:
            check_run([str(source), *arguments])
            bundle = _built(source, quiet="--quiet" in arguments)
        except RecmasError as error:
            report(error.problems, as_json="--json" in arguments)
            return int(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            return Exit.INTERRUPTED
    return runtime_main(["run", str(bundle), *arguments])


def _built(source: Path, *, quiet: bool) -> Path:
    progress = shown_progress(quiet=quiet)
    program = with_trained_links(load_and_compile(source, progress=progress))
    for warning in program.spec.warnings:
        click.echo(str(warning), err=True)
    folder = Path("out") / program.graph.system.name
    _, built = build_bundle(program, folder, progress=progress)
    return built.path
