"""`recmasc eval` and `recmasc bench`: how good, how fast and how cheap a system is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recmas_compiler.cli_options import QUIET
from recmas_compiler.console import Outcome, RichProgress, command
from recmas_runtime.progress import Silent


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto")
@click.option("--threads", type=click.IntRange(1, 4096), metavar="N")
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
    from recmas_compiler.evaluation.command import EvalOptions, option_overrides
    from recmas_compiler.evaluation.command import evaluate as run_evaluation

    found = (*overrides, *option_overrides(limit, seeds))
    return run_evaluation(EvalOptions(bundle=bundle, overrides=found, **options))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
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
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto")
@click.option("--threads", type=click.IntRange(1, 4096), metavar="N")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for bench.json, bench.md and, with matplotlib, bench.png.",
)
@QUIET
@command
def bench(*, rounds: str | None, latent_steps: str | None, quiet: bool, **options: Any) -> Outcome:
    """Measure time, tokens and speed-up of a BUNDLE beside its baselines."""
    from recmas_compiler.bench.command import bench as run_bench
    from recmas_runtime.bench.command import BenchOptions

    progress = Silent() if quiet else RichProgress()
    asked = BenchOptions(**options)
    return run_bench(asked, rounds=rounds, latent_steps=latent_steps, progress=progress)
