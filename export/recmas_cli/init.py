"""`recmasc init`: a commented spec to start from."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import FILE, Outcome, command
from recmas_compiler.spec.document.places import is_file
from recmas_compiler.spec.patterns.starter_specs import starter_files, starter_spec
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import check_free, placed_together
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
    "--task",
    metavar="TASK",
    help="What to ask for: general, math, choice, code or search; of split: qa or two-hop; of "
    "latentmas: sequential or hierarchical.",
)
@click.option(
    "--train",
    is_flag=True,
    help="With a section `train`, records to learn from and questions to ask.",
)
@click.option(
    "--paper",
    is_flag=True,
    help="With links that carry thoughts, as the paper's do, in place of rows of caches.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@command
def init(
    pattern: str, out: Path, task: str | None, *, train: bool, paper: bool, force: bool
) -> Outcome:
    """Write a commented spec to start from.

    PATTERN is relay, split, sequential, mixture, distillation, deliberation, latentmas, or custom
    for a graph of your own. The relay is the smallest one that shows what messages do: train it and
    see. In split agents read what the one that is asked does not see. Of latentmas nothing is
    trained. Untrained systems of the others hand over rows of caches, which do no harm; with
    --train, or --paper, thoughts.
    """
    if not out.name:
        raise fail("RM302", f"{out} is a folder", hint="Name a file, such as -o spec.yaml.")
    files = starter_files(pattern, task=task, train=train)
    text = starter_spec(pattern, task=task, train=train, paper=paper)
    files |= {SCHEMA_FILE: schema_text(), out.name: text}
    theirs = [name for name in files if name != SCHEMA_FILE or not is_file(out.with_name(name))]
    check_free(out.parent, theirs, force=force)
    with placed_together(out.parent, list(files)) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
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
