"""`recmasc train`: the links of a spec learn; the backbones never change."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import click

from recmas_cli.console import (
    FOLDER,
    OFFLINE,
    QUIET,
    SET,
    SPEC,
    TRACKER,
    Outcome,
    command,
    shown_progress,
)
from recmas_compiler.api import Program, load_and_compile, training_folder, with_trained_links
from recmas_compiler.spec.schema.train import MethodName, Stage
from recmas_compiler.trackers.tracking import chosen_trackers
from recmas_compiler.training.preflight import check_processes, prepared_run
from recmas_compiler.training.settings import TrainSettings, train_settings
from recmas_runtime.core.errors import fail

if TYPE_CHECKING:
    from recmas_compiler.training.receipt import RunReport
    from recmas_compiler.training.session import Session

# What every process of `--nproc` runs.
PROCESS_MODULE: Final = "recmas_cli.training_main"


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
    type=click.Choice(["links", *get_args(MethodName)]),
    default="links",
    show_default=True,
    help="What learns; to compare with, lora and sft train the answer agent alone, text all agents "
    "of a text system.",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of each stage.")
@SET
@click.option(
    "-o",
    "--out",
    type=FOLDER,
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
@TRACKER
@click.option("--tensorboard", metavar="DIR", help="The same as --tracker tensorboard=DIR.")
@OFFLINE
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
    method: Literal["links"] | MethodName,
    resume: bool,
    eval_only: bool,
    trackers: tuple[str, ...],
    tensorboard: str | None,
    offline: bool,
    quiet: bool,
) -> Outcome:
    """Train the links of a SPEC with a `train` section; the backbones never change."""
    stages = ("inner", "outer") if steps is not None else ()
    found = (*overrides, *(f"train.{name}.steps={steps}" for name in stages))
    program = load_and_compile(spec, found, progress=shown_progress(quiet=quiet), offline=offline)
    settings = train_settings(program.spec)
    if method != "links" and (eval_only or stage == "inner"):
        raise fail(
            "RM506",
            f"--method {method} has no inner stage and no --eval-only",
            hint="Leave these options out.",
        )
    named = [] if tensorboard is None else [f"tensorboard={tensorboard}"]
    chosen = chosen_trackers((*trackers, *named))
    own = None if method == "links" else method
    if nproc > 1:
        shared: Stage = stage if own is None else "outer"
        check_processes(settings.section, shared, nproc)
        _train_in_processes(nproc, sys.argv[2:])
    if eval_only:
        return _evaluated(with_trained_links(program), settings, quiet=quiet)
    folder = out if out is not None else training_folder(program.spec)
    is_main = int(os.environ.get("RANK", "0")) == 0
    with prepared_run(
        program.spec,
        program.graph,
        settings,
        stage=stage,
        folder=folder,
        resume=resume,
        method=own,
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        is_main=is_main,
    ) as examples:
        # Torch takes seconds to import, and what is refused is refused before.
        from recmas_compiler.training.run import RunOptions, train_program

        session, report = train_program(
            program.spec,
            program.graph,
            settings,
            examples,
            RunOptions(folder=folder, resume=resume, trackers=chosen),
            stage=stage,
            method=own,
            progress=shown_progress(quiet=quiet or not is_main),
        )
        if own is not None:
            return _method_trained(session, report, own, folder)
        return _trained(session, report, stage, folder)


def _train_in_processes(num_processes: int, arguments: Sequence[str]) -> None:
    """Run `recmasc train` in several processes and exit as they do; the spec has been checked."""
    from recmas_compiler.training.loop.distributed import launch

    ended = launch(num_processes, PROCESS_MODULE, without_option(arguments, "--nproc"))
    sys.stdout.write(ended.stdout)
    sys.stderr.write(ended.stderr)
    sys.exit(ended.status)


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return command-line arguments without an option and its value."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


def _evaluated(program: Program, settings: TrainSettings, *, quiet: bool) -> Outcome:
    from recmas_compiler.training.loop.distributed import joined_world
    from recmas_compiler.training.session import open_session
    from recmas_compiler.training.tasks.outer import record_losses

    progress = shown_progress(quiet=quiet)
    with joined_world() as world:
        session = open_session(
            program.spec, program.graph, settings, world=world, progress=progress
        )
    session.start(as_built=True)
    examples = session.examples.train
    if not isinstance(session.settings.held_out, Path):
        examples += session.examples.held_out
    examples = tuple(sorted(examples, key=lambda example: example.index))
    section = session.settings.section
    with progress.stage("Measuring losses", len(examples)) as advance:
        records = record_losses(
            session.graph, examples, batch_size=section.outer.batch_size, advance=advance
        )
    tokens = sum(record["tokens"] for record in records)
    mean = sum(record["loss"] * record["tokens"] for record in records) / tokens
    text = "".join(
        f"{record['id']}  loss {record['loss']:.4f}  {record['tokens']} tokens\n"
        for record in records
    )
    return Outcome(
        text=f"{text}mean over {tokens} tokens: {mean:.4f} ({section.outer.mode})",
        data={
            "mode": section.outer.mode,
            "mean": mean,
            "tokens": tokens,
            "records": records,
            "left_out": dict(session.examples.left_out),
        },
        problems=session.spec.warnings + session.examples.warnings,
    )


def _trained(session: Session, report: RunReport, stage: Stage, out: Path) -> Outcome:
    folder = session.settings.links_dir
    done = (
        f"Trained {len(report.trained)} links into {folder}.\n"
        "Next: recmasc build, which takes them from there."
    )
    data = {
        "stage": stage,
        "folder": str(out),
        "links_dir": str(folder),
        "trained": list(report.trained),
    }
    lines = _stage_lines(report.stages, interrupted=report.interrupted)
    return _outcome(session, report, data, lines, costs=_costs(out), done=done)


def _method_trained(session: Session, report: RunReport, method: MethodName, out: Path) -> Outcome:
    from recmas_compiler.training.tasks.finetuning import MODEL, SingleAgentTask, TextSystemTask

    agent, figures = session.system.answer_agent, report.stages[method]
    costs, model = _costs(out), out / method / MODEL
    who, figure = (
        ("all agents", TextSystemTask.figure)
        if method == "text"
        else (f"`{agent}` alone", SingleAgentTask.figure)
    )
    lines = [
        f"{method} of {who}: {figures['steps']} steps",
        f"  held-out loss {_change(figures, figure, interrupted=report.interrupted)}",
    ]
    if method in costs:
        learning = costs[method]["trainable_parameters"]
        memory, seconds = costs[method]["peak_memory_mb"], costs[method]["step_seconds"]
        lines.append(f"  {learning:,} parameters, {memory:.0f} MiB, {seconds:.2f} s per step")
    data = {
        "method": method,
        "agent": agent,
        "folder": str(out),
        "model": None if report.interrupted else str(model),
    }
    done = f"The backbone it gave is {model}; links are as they were."
    return _outcome(session, report, data, lines, costs=costs, done=done)


def _outcome(
    session: Session,
    report: RunReport,
    data: Mapping[str, Any],
    lines: Sequence[str],
    *,
    costs: Mapping[str, Any],
    done: str,
) -> Outcome:
    """Return what both kinds of run say, and how they end: with `done` unless interrupted."""
    examples = session.examples
    stopped = "Stopped before the end. Go on with the same command and --resume."
    ending = stopped if report.interrupted else done
    return Outcome(
        text="\n".join([*lines, ending]),
        data={
            **data,
            "stages": report.stages,
            "costs": costs,
            "records": {
                "train": len(examples.train),
                "held_out": len(examples.held_out),
                "left_out": dict(examples.left_out),
            },
            "processes": session.world.size,
        },
        problems=report.warnings,
        interrupted=report.interrupted,
    )


def _costs(out: Path) -> dict[str, Any]:
    from recmas_compiler.training.loop.metrics import read_costs

    return {place: asdict(cost) for place, cost in read_costs(out).items()}


def _stage_lines(stages: Mapping[str, Mapping[str, Any]], *, interrupted: bool) -> Sequence[str]:
    """Return the figures of the stages in words, before -> after."""
    lines = []
    for agent, figures in stages.get("inner", {}).items():
        measured = _change(figures, "cosine", interrupted=interrupted)
        levels = ", ".join(f"{name} {level:.3f}" for name, level in figures["baselines"].items())
        compared = f" (held out; {levels})" if levels else ""
        lines.append(f"inner {agent}: {figures['steps']} steps, cosine {measured}{compared}")
    outer = stages.get("outer")
    if outer:
        lines.append(f"outer: {outer['steps']} steps; held-out loss with generated thoughts:")
        lines += [
            f"  {name:<9} {_change(outer, name, interrupted=interrupted)}"
            for name in outer["after"]
        ]
    return lines


def _change(figures: Mapping[str, Any], name: str, *, interrupted: bool) -> str:
    before, after = figures["before"].get(name), figures["after"].get(name)
    if after is None:
        return "not measured"
    if interrupted and figures["before"] == figures["after"]:  # its start was measured last
        return f"{after:.4f} at the start, not measured since"
    return f"{'-' if before is None else f'{before:.4f}'} -> {after:.4f}"
