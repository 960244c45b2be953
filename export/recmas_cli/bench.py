"""`recmasc bench`: systems, engines and trainings beside others of their kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from recmas_cli.console import (
    BUNDLE,
    DEVICE,
    FILE,
    FOLDER,
    OFFLINE,
    QUIET,
    SET,
    SPEC,
    THREADS,
    Outcome,
    command,
    shown_progress,
)

if TYPE_CHECKING:
    from recmas_runtime.bench.command import Forms
    from recmas_runtime.running.system import System

_PAPER_ROUNDS: Final = (1, 2, 3)
# What every command of a cost table runs in a process of its own.
_COMMANDS: Final = "recmas_cli.main"


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Return the numbers in order, each once."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not a list of numbers such as 1,8", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


class _DefaultGroup(click.Group):
    """A group whose first command may go unnamed: `bench BUNDLE` is `bench systems BUNDLE`."""

    default = "systems"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front of arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultGroup)
def bench() -> None:
    """Measure a bundle's system or engines beside others, or what can learn in a spec.

    `recmasc bench BUNDLE` is short for `recmasc bench systems BUNDLE`.
    """


@bench.command("systems", short_help="A system beside its baselines; the default.")
@BUNDLE
@click.option("--rounds", type=_Numbers(), help="Rounds to measure  [default: 1,2,3].")
@click.option(
    "--latent-steps", type=_Numbers(), default=(), help="Latent steps to measure as well."
)
@click.option("--data", metavar="FILE", help="Records to ask, JSON lines.")
@click.option(
    "--question", "questions", multiple=True, metavar="TEXT", help="Ask this; may be repeated."
)
@click.option("--limit", type=int, metavar="N", help="The first N only.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME",
    help="single, all-context, text, text@N, moa, moa@N, latentmas, looplm, null, shuffled or "
    "mean; may be repeated  [default: text].",
)
@click.option(
    "--untrained-bundle",
    "--frozen-bundle",  # the name of version 0.1
    type=FILE,
    help="The system with untrained links, to measure as well.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Records per batch.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Most tokens of every text.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Repeats before it counts.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Repeats that count.")
@DEVICE
@THREADS
@click.option(
    "--out", type=FOLDER, help="Folder for bench.json, bench.md and, with matplotlib, bench.png."
)
@QUIET
@command
def bench_systems(
    *, rounds: tuple[int, ...] | None, latent_steps: tuple[int, ...], quiet: bool, **options: Any
) -> Outcome:
    """Measure time, tokens and speed-up of a BUNDLE beside its baselines."""
    from recmas_compiler.bench.plots import draw_report
    from recmas_runtime.bench.command import BenchOptions
    from recmas_runtime.bench.command import bench as run_bench
    from recmas_runtime.core.errors import Problem

    asked = BenchOptions(**options)
    problems: list[Problem] = []
    report = run_bench(
        asked,
        problems,
        forms_of=_replanned(rounds, latent_steps),
        progress=shown_progress(quiet=quiet),
    )
    if asked.out is not None:
        draw_report(report, asked.out / "bench.png")
    return Outcome(
        text=report.to_markdown(),
        data=report.to_json(),
        problems=tuple(problems),
        interrupted=report.interrupted,
    )


def _replanned(
    rounds: tuple[int, ...] | None, latent_steps: tuple[int, ...]
) -> Callable[[Path, System], Forms]:
    """Return what makes a system's forms: other rounds and steps are other plans, engines stay."""
    from recmas_export.replan import Replanner
    from recmas_runtime.bench.command import Forms
    from recmas_runtime.formats.bundle import open_bundle

    def forms_of(path: Path, system: System) -> Forms:
        replanner = Replanner(open_bundle(path))
        counts = rounds or tuple(n for n in _PAPER_ROUNDS if n <= system.plan.rounds)
        plans = [replanner.plan(rounds=count) for count in counts]
        swept = [replanner.plan(rounds=max(counts), latent_steps=steps) for steps in latent_steps]
        return Forms(
            by_rounds=tuple(system.with_plan(plan) for plan in plans),
            by_steps=tuple(system.with_plan(plan) for plan in swept if plan not in plans),
        )

    return forms_of


@bench.command("engines", short_help="Engines beside other engines and the floor.")
@BUNDLE
@click.option(
    "--bundle",
    "others",
    type=FILE,
    multiple=True,
    help="A bundle of the same model in another precision, to measure as well; may be repeated.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME",
    help="onnx (the bundles' own), torch, huggingface, naive or genai; may be repeated  "
    "[default: all that are there].",
)
@click.option(
    "--genai",
    type=FILE,
    multiple=True,
    metavar="DIR",
    help="A model that onnxruntime-genai's builder wrote; may be repeated.",
)
@click.option(
    "--batch", "batches", type=_Numbers(), default="1", show_default=True, help="Rows together."
)
@click.option(
    "--capacity",
    "capacities",
    type=_Numbers(),
    default="512",
    show_default=True,
    help="Cache rows of a sequence.",
)
@click.option(
    "--used",
    type=_Numbers(),
    default="128",
    show_default=True,
    help="Cache rows in use when a step begins; the prompt has as many tokens.",
)
@click.option(
    "--steps", type=int, default=16, show_default=True, help="Latent steps, and tokens, at a time."
)
@click.option("--warmup", type=int, default=1, show_default=True, help="Turns before it counts.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Turns that count.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to measure; auto takes the best that is there.",
)
@THREADS
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for engines.json, engines.md and, with matplotlib, engines.png.",
)
@QUIET
@command
def bench_engines(
    bundle: Path, others: tuple[Path, ...], *, out: Path | None, quiet: bool, **options: Any
) -> Outcome:
    """Measure the latent step of a BUNDLE's engines beside other engines and the floor.

    The floor is the time of reading a step's weights once, measured in the same run.
    """
    from recmas_compiler.bench.engine_report import engine_report
    from recmas_compiler.bench.engines import EngineOptions, measure_engines
    from recmas_compiler.bench.plots import draw_engines
    from recmas_runtime.bench.command import make_folder, writing
    from recmas_runtime.formats.bundle import keep_out, write_json_atomic

    for root in (bundle, *others):
        keep_out(root, {"--out": out})
    make_folder(out)
    asked = EngineOptions(bundles=(bundle, *others), **options)
    report = engine_report(asked, measure_engines(asked, progress=shown_progress(quiet=quiet)))
    if out is not None:
        with writing(out):
            write_json_atomic(out / "engines.json", report.to_json())
            (out / "engines.md").write_text(report.to_markdown() + "\n", encoding="utf-8")
            draw_engines(report, out / "engines.png")
    return Outcome(text=report.to_markdown(), data=report.to_json(), interrupted=report.interrupted)


@bench.command("training", short_help="What can learn from a spec's data, beside its costs.")
@SPEC
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help="inner and outer (links), looplm, lora, sft, text or textgrad; may be repeated  "
    "[default: all].",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Of every stage and method.")
@click.option(
    "--rounds",
    type=_Numbers(),
    default=(),
    help="Rounds of the system; the outer stage has a row for each  [default: the spec's].",
)
@click.option(
    "--hourly-rate",
    type=click.FloatRange(min=0),
    metavar="RATE",
    help="What an hour of this machine costs; the table then has prices.",
)
@click.option("--data", type=FILE, help="Questions to ask built bundles, with --protocol.")
@click.option("--protocol", metavar="NAME|FILE", help="How to ask and to check.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N questions.")
@SET
@click.option(
    "-o",
    "--out",
    type=FOLDER,
    required=True,
    help="Folder for the table and all that is trained; table.md and table.json are in it.",
)
@click.option("--resume", is_flag=True, help="Go on; finished rows are kept.")
@OFFLINE
@QUIET
@command
def bench_training(*, quiet: bool, **options: Any) -> Outcome:
    """Train all that can learn from the data of a SPEC, and put it beside its costs.

    Links, a self-loop, LoRA, full fine-tuning, a text system fine-tuned or with prompts by textual
    gradients: the same records, as many steps; trainable parameters, memory, seconds, price,
    held-out loss and right answers of each.
    """
    from recmas_compiler.bench.training_costs import measure_training
    from recmas_compiler.bench.training_report import costs_json, costs_markdown
    from recmas_compiler.bench.training_rows import TrainingCostOptions
    from recmas_runtime.bench.command import writing

    asked = TrainingCostOptions(**options)
    found = measure_training(asked, commands=_COMMANDS, progress=shown_progress(quiet=quiet))
    text = costs_markdown(found)
    with writing(asked.out):
        (asked.out / "table.md").write_text(text + "\n", encoding="utf-8")
    return Outcome(text=text, data=costs_json(found), interrupted=found.interrupted)
