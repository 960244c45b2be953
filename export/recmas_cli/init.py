"""`recmasc init`: a commented spec to start from."""

from __future__ import annotations

import os
from pathlib import Path

import click

from recmas_cli.console import FILE, Outcome, command, write_text
from recmas_compiler.spec.patterns.starter_specs import starter_files, starter_spec
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import listed


@click.command()
@click.argument("pattern")
@click.option(
    "-o",
    "--out",
    type=FILE,
    default=Path("spec.yaml"),
    show_default=True,
    help="The spec to write; other files land beside it.",
)
@click.option(
    "--task", metavar="TASK", help="What to ask for: general, math, choice, code or search."
)
@click.option(
    "--train",
    is_flag=True,
    help="With a section `train`, records to learn from and questions to ask.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@command
def init(pattern: str, out: Path, task: str | None, *, train: bool, force: bool) -> Outcome:
    """Write a commented spec to start from.

    PATTERN is relay, sequential, mixture, distillation, deliberation, or custom for a graph of your
    own. The relay is the smallest one that shows what messages do: train it and see.
    """
    # The spec last: where it is, all is.
    files = {SCHEMA_FILE: schema_text()}
    files |= starter_files(pattern, task=task) if train else {}
    files |= {out.name: starter_spec(pattern, task=task, train=train)}
    taken = [name for name in files if name != SCHEMA_FILE and os.path.lexists(out.with_name(name))]
    if taken and not force:
        verb = "exists" if len(taken) == 1 else "exist"
        paths = listed(out.with_name(name) for name in taken)
        hint = "Choose another --out or pass --force."
        raise fail("RM302", f"{paths} {verb} already", hint=hint)
    for name, text in files.items():
        write_text(out.with_name(name), text)
    others = listed(out.with_name(name) for name in files if name != out.name)
    after = "train" if train else "build"
    return Outcome(
        text=f"Wrote {out}; beside it {others}.\n"
        f"Next: recmasc check {out}, then recmasc {after} {out}.",
        data={
            "path": str(out),
            "schema": str(out.with_name(SCHEMA_FILE)),
            "files": [str(out.with_name(name)) for name in files],
        },
    )
