"""Arguments and options that several commands of `recmasc` share."""

from __future__ import annotations

from pathlib import Path

import click

SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Override a key of the spec; may be repeated.",
)
DUMP_IR = click.option(
    "--dump-ir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the IR after every pass into this folder.",
)
QUIET = click.option("--quiet", is_flag=True, help="No progress on stderr.")
DEVICE = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto"
)
THREADS = click.option("--threads", type=click.IntRange(1, 4096), metavar="N")
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
