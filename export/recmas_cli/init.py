"""`recmasc init`: a commented spec to start from."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import FILE, Outcome, command, write_text
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text
from recmas_runtime.core.errors import fail


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
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@command
def init(pattern: str, out: Path, task: str | None, *, force: bool) -> Outcome:
    """Write a commented spec to start from.

    PATTERN is sequential, mixture, distillation, deliberation, or custom for a graph of your own.
    """
    text = starter_spec(pattern, task=task)
    if out.exists() and not force:
        raise fail("RM302", f"{out} exists already", hint="Choose another --out or pass --force.")
    schema = out.with_name(SCHEMA_FILE)
    write_text(out, text)
    write_text(schema, schema_text())
    return Outcome(
        text=f"Wrote {out} and {schema} (for editors).\n"
        f"Next: recmasc check {out}, then recmasc build {out}.",
        data={"path": str(out), "schema": str(schema)},
    )
