"""`recmasc eval` and `recmasc bench`: how good, how fast and how cheap a system is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recmas_cli.console import Outcome, RichProgress, command
from recmas_cli.options import BUNDLE, DEVICE, QUIET, THREADS
from recmas_runtime.core.progress import Silent


@click.command("eval")
@BUNDLE
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Records to ask.")
@click.option("--protocol", required=True, metavar="NAME|FILE", help="How to ask and to check.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME",
    help="latent (the system itself), single, text, text@N, moa, moa@N, null-latents, "
    "shuffled-latents or frozen-links; may be repeated  [default: latent].",
)
@click.option(
    "--frozen-bundle",
    type=click.Path(path_type=Path),
    help="The system with untrained links, for frozen-links.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Records to ask.")
@click.option("--batch", type=int, metavar="N", help="Records per batch  [default: the most].")
@click.option("--seeds", metavar="N,N,...", help="Instead of the protocol's.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the protocol; may be repeated.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for answers and report  [default: out/SYSTEM-PROTOCOL].",
)
@click.option("--resume", is_flag=True, help="Go on with the answers that are there.")
@DEVICE
@THREADS
@QUIET
@command
def evaluate(
    bundle: Path,
    *,
    limit: int | None,
    seeds: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> Outcome:
    """Ask a BUNDLE, and baselines on its engines, the questions of a data set.

    The report says how often each is right, at what cost in tokens and time.
    """
    from recmas_cli.evaluation_command import EvalOptions, option_overrides
    from recmas_cli.evaluation_command import evaluate as run_evaluation

    found = (*overrides, *option_overrides(limit, seeds))
    return run_evaluation(EvalOptions(bundle=bundle, overrides=found, **options))


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
    """Measure a bundle: its system beside others, or its engines beside others.

    `recmasc bench BUNDLE` is short for `recmasc bench systems BUNDLE`.
    """


@bench.command("systems")
@BUNDLE
@click.option("--rounds", metavar="N,N,...", help="Rounds to measure  [default: 1,2,3].")
@click.option("--latent-steps", metavar="N,N,...", help="Latent steps to measure as well.")
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
    help="single, text, text@N, moa, moa@N, null-latents or shuffled-latents; may be repeated  "
    "[default: text].",
)
@click.option(
    "--frozen-bundle",
    type=click.Path(path_type=Path),
    help="The system with untrained links, to measure as well.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Records per batch.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Most tokens of every text.")
@click.option("--warmup", type=int, default=1, show_default=True, help="Repeats before it counts.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Repeats that count.")
@DEVICE
@THREADS
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for bench.json, bench.md and, with matplotlib, bench.png.",
)
@QUIET
@command
def bench_systems(
    *, rounds: str | None, latent_steps: str | None, quiet: bool, **options: Any
) -> Outcome:
    """Measure time, tokens and speed-up of a BUNDLE beside its baselines."""
    from recmas_cli.bench_command import bench as run_bench
    from recmas_runtime.bench.command import BenchOptions

    progress = Silent() if quiet else RichProgress()
    asked = BenchOptions(**options)
    return run_bench(asked, rounds=rounds, latent_steps=latent_steps, progress=progress)


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


@bench.command("engines")
@BUNDLE
@click.option(
    "--bundle",
    "others",
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@THREADS
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
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
    from recmas_cli.engines_command import bench_engines as run_engines
    from recmas_compiler.bench.engines.measure import EngineOptions

    asked = EngineOptions(bundles=(bundle, *others), **options)
    return run_engines(asked, out=out, progress=Silent() if quiet else RichProgress())
