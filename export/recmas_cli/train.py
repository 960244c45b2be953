"""`recmasc train`: the links of a spec learn; the backbones never change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from recmas_cli.console import QUIET, SET, SPEC, Outcome, command, shown_progress
from recmas_compiler.api import load_and_compile, with_trained_links

Stage = Literal["inner", "outer", "all"]


@click.command()
@SPEC
@click.option(
    "--stage",
    type=click.Choice(["inner", "outer", "all"]),
    default="all",
    show_default=True,
    help="Inner links agent by agent, all links through the whole program, or both in turn.",
)
@click.option(
    "--method",
    type=click.Choice(["links", "lora", "sft"]),
    default="links",
    show_default=True,
    help="What learns; lora and sft train the answer agent alone, to compare with.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of each stage.")
@SET
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for metrics, checkpoints and curves  [default: out/NAME-training].",
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
@click.option("--eval-only", is_flag=True, help="Only print the loss of every training record.")
@click.option(
    "--nproc",
    type=click.IntRange(1, 1024),
    default=1,
    metavar="N",
    help="Processes on this machine that share the work, one per GPU.",
)
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the figures for TensorBoard too.",
)
@QUIET
@command
def train(
    spec: Path,
    overrides: tuple[str, ...],
    steps: int | None,
    *,
    stage: Stage,
    out: Path | None,
    nproc: int,
    **options: Any,
) -> Outcome:
    """Train the links of a SPEC with a `train` section; the backbones never change."""
    stages = ("inner", "outer") if steps is not None else ()
    found = (*overrides, *(f"train.{name}.steps={steps}" for name in stages))
    progress = shown_progress(quiet=options["quiet"])
    program = load_and_compile(spec, found, progress=progress)
    from recmas_cli.training_command import TrainOptions, train_in_processes
    from recmas_cli.training_command import train as run_training

    if nproc > 1:
        shared: Stage = stage if options["method"] == "links" else "outer"
        train_in_processes(program.spec, shared, nproc, sys.argv[2:])
    if options["eval_only"]:
        program = with_trained_links(program)
    folder = out if out is not None else Path("out") / f"{program.spec.document.name}-training"
    return run_training(
        program.spec, program.graph, TrainOptions(stage=stage, out=folder, **options)
    )
