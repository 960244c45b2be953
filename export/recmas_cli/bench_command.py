"""`recmasc bench`: what `recmas bench` does, for many rounds and latent steps, with a plot.

Other rounds and steps need other plans, which the compiler makes; the engines stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from recmas_cli.console import Outcome
from recmas_compiler.bench.plot import draw_report
from recmas_export.replan import Replanner
from recmas_runtime.bench.command import BenchOptions, Forms
from recmas_runtime.bench.command import bench as run_bench
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.running.system import System

PLOT_NAME: Final = "bench.png"

# The rounds that the paper measures.
_ROUNDS: Final = (1, 2, 3)


def bench(
    options: BenchOptions, *, rounds: str | None, latent_steps: str | None, progress: Progress
) -> Outcome:
    """Measure a bundle's system in several forms.

    Args:
        options: What to measure, and how.
        rounds: Comma-separated; None for 1 to 3, as far as the bundle goes.
        latent_steps: Comma-separated; run with the most rounds.
        progress: Is told of every run.

    Raises:
        RecmasError: As `recmas_runtime.bench.command.bench`, and what making plans raises.
    """
    asked_rounds = None if rounds is None else _numbers("--rounds", rounds)
    asked_steps = () if latent_steps is None else _numbers("--latent-steps", latent_steps)

    def forms_of(path: Path, system: System) -> Forms:
        replanner = Replanner(open_bundle(path))
        counts = asked_rounds or tuple(n for n in _ROUNDS if n <= system.plan.rounds)
        plans = [replanner.plan(rounds=count) for count in counts]
        swept = [replanner.plan(rounds=max(counts), latent_steps=steps) for steps in asked_steps]
        return Forms(
            by_rounds=tuple(system.with_plan(plan) for plan in plans),
            by_steps=tuple(system.with_plan(plan) for plan in swept if plan not in plans),
        )

    problems: list[Problem] = []
    report = run_bench(options, problems, forms_of=forms_of, progress=progress)
    if options.out is not None:
        draw_report(report, options.out / PLOT_NAME)
    return Outcome(
        text=report.to_markdown(),
        data=report.to_json(),
        problems=tuple(problems),
        interrupted=report.interrupted,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Return numbers in order, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise fail(
            "RM506", f"{option} {text} is not a list of numbers", hint=f"Write {option} 1,2,3."
        )
    return tuple(sorted({int(part) for part in parts}))
