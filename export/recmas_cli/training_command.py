"""The command `recmasc train`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from recmas_cli.console import Outcome, RichProgress
from recmas_compiler.ir.graph import Graph
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.loop.distributed import joined_world, launch
from recmas_compiler.training.loop.loop import Sink
from recmas_compiler.training.loop.metrics import COST_NAME, read_cost
from recmas_compiler.training.run import (
    RunOptions,
    RunReport,
    Stage,
    check_processes,
    run_method,
    run_stages,
)
from recmas_compiler.training.session import Session, open_session, train_settings
from recmas_compiler.training.tasks.finetuning import MODEL, MethodName
from recmas_compiler.training.tasks.outer import record_losses
from recmas_runtime.core.errors import fail
from recmas_runtime.core.progress import Silent

# What every process of `--nproc` runs.
PROCESS_MODULE: Final = "recmas_cli.training_main"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The arguments of `recmasc train` besides the spec.

    Attributes:
        stage: What to train.
        method: What learns.
        out: Folder of the run.
        resume: Go on from the last checkpoints.
        eval_only: Only print the loss of every record.
        tensorboard: Folder for TensorBoard; None for none.
        quiet: Show no progress.
    """

    stage: Stage
    method: Literal["links"] | MethodName
    out: Path
    resume: bool
    eval_only: bool
    tensorboard: Path | None
    quiet: bool


def train(spec: Spec, program: Graph, options: TrainOptions) -> Outcome:
    """Train the links of a spec, or measure them.

    Args:
        spec: With a `train` section.
        program: Compiled from it.
        options: The arguments.

    Raises:
        RecmasError: RM104 without `train`, RM506 for options that exclude each other, RM700 for
            data that cannot be used, and what `run_stages` and `run_method` raise.
    """
    settings = train_settings(spec)
    if options.method != "links" and (options.eval_only or options.stage == "inner"):
        raise fail(
            "RM506",
            f"--method {options.method} has no inner stage and no --eval-only",
            hint="Leave these options out.",
        )
    run = RunOptions(
        folder=options.out,
        resume=options.resume,
        make_sink=None if options.tensorboard is None else _tensorboard(options.tensorboard),
    )
    with joined_world() as world:
        session = open_session(
            spec,
            program,
            settings,
            world=world,
            progress=RichProgress() if world.is_main and not options.quiet else Silent(),
            # Steps of usual length are lost in the rounding of bfloat16 weights.
            weights="float32" if options.method == "sft" else None,
        )
        if options.method != "links":
            report = run_method(session, options.method, run)
            return _method_trained(session, report, options, options.method)
        if options.eval_only:
            return _evaluated(session)
        return _trained(session, run_stages(session, options.stage, run), options)


def train_in_processes(
    spec: Spec, stage: Stage, num_processes: int, arguments: Sequence[str]
) -> None:
    """Run `recmasc train` in several processes of this machine, and exit as they do.

    Args:
        spec: Has been checked, so that its mistakes are reported once.
        stage: What to train.
        num_processes: How many.
        arguments: Of `recmasc train`, with `--nproc`.

    Raises:
        RecmasError: RM104 without `train`, RM704 for too many processes.
    """
    check_processes(train_settings(spec).section, stage, num_processes)
    sys.exit(launch(num_processes, PROCESS_MODULE, without_option(arguments, "--nproc")))


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


def _evaluated(session: Session) -> Outcome:
    session.start(as_built=True)
    examples = session.examples.train
    if not isinstance(session.settings.held_out, Path):
        examples += session.examples.held_out
    examples = tuple(sorted(examples, key=lambda example: example.index))
    section = session.settings.section
    records = record_losses(session.graph, examples, batch_size=section.outer.batch_size)
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


def _trained(session: Session, report: RunReport, options: TrainOptions) -> Outcome:
    folder = session.settings.links_dir
    done = (
        f"Trained {len(report.trained)} links into {folder}.\n"
        "Next: recmasc build, which takes them from there."
    )
    data = {
        "stage": options.stage,
        "folder": str(options.out),
        "links_dir": str(folder),
        "trained": list(report.trained),
    }
    lines = _stage_lines(report.stages)
    return _outcome(session, report, data, lines, costs=_costs(options.out), done=done)


def _method_trained(
    session: Session, report: RunReport, options: TrainOptions, method: MethodName
) -> Outcome:
    agent, figures = session.system.answer_agent, report.stages[method]
    costs, model = _costs(options.out), options.out / method / MODEL
    lines = [f"{method} of `{agent}` alone: {figures['steps']} steps"]
    lines.append(f"  held-out loss {_change(figures, 'alone')}")
    if method in costs:
        learning = costs[method]["trainable_parameters"]
        memory, seconds = costs[method]["peak_memory_mb"], costs[method]["step_seconds"]
        lines.append(f"  {learning:,} parameters, {memory:.0f} MiB, {seconds:.2f} s per step")
    data = {
        "method": method,
        "agent": agent,
        "folder": str(options.out),
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
    ending = "Stopped before the end. Go on with --resume." if report.interrupted else done
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
        problems=session.spec.warnings + examples.warnings,
        interrupted=report.interrupted,
    )


def _costs(out: Path) -> dict[str, Any]:
    """Return what every loop in a run's folder took, by its own folder."""
    folders = sorted(path.parent for path in out.glob(f"**/{COST_NAME}"))
    return {str(folder.relative_to(out)): asdict(read_cost(folder)) for folder in folders}


def _stage_lines(stages: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """Return the figures of the stages in words, before -> after."""
    lines = []
    for agent, figures in stages.get("inner", {}).items():
        measured = _change(figures, "cosine")
        levels = ", ".join(f"{name} {level:.3f}" for name, level in figures["baselines"].items())
        compared = f" (held out; {levels})" if levels else ""
        lines.append(f"inner {agent}: {figures['steps']} steps, cosine {measured}{compared}")
    outer = stages.get("outer")
    if outer:
        lines.append(f"outer: {outer['steps']} steps; held-out loss with generated thoughts:")
        lines += [f"  {name:<9} {_change(outer, name)}" for name in outer["after"]]
    return lines


def _change(figures: Mapping[str, Any], name: str) -> str:
    before, after = figures["before"].get(name), figures["after"].get(name)
    if after is None:
        return "not measured"
    return f"{'-' if before is None else f'{before:.4f}'} -> {after:.4f}"


def _tensorboard(folder: Path) -> Callable[[str], Sink]:
    """Return what makes a stage's writer.

    Raises:
        RecmasError: RM201 without the package.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise fail(
            "RM201",
            "--tensorboard needs the package tensorboard, which is not installed",
            hint="Install it with `pip install tensorboard`.",
        ) from error

    def make(title: str) -> Sink:
        writer = SummaryWriter(str(folder / title.replace(" ", "-")))

        def write(entry: Mapping[str, Any]) -> None:
            kind, step = entry["kind"], entry["step"]
            for name, value in entry.items():
                parts = value if isinstance(value, dict) else {"": value}
                for part, number in parts.items():
                    if name not in ("kind", "step"):
                        writer.add_scalar(f"{kind}/{name}/{part}".rstrip("/"), number, step)

        return write

    return make
