"""`recmasc eval`: how good and how cheap a system is on a data set, beside its alternatives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recmas_cli.console import (
    BUNDLE,
    DEVICE,
    FILE,
    FOLDER,
    QUIET,
    THREADS,
    TRACKER,
    Outcome,
    command,
    shown_progress,
)
from recmas_runtime.core.errors import fail

if TYPE_CHECKING:
    from recmas_compiler.evaluation.evaluate import EvalOptions, Evaluated
    from recmas_compiler.text_gradients import TextGradients
    from recmas_runtime.core.progress import Progress


TEXTGRAD = "textgrad"


def list_protocols(context: click.Context, _: click.Parameter, value: str) -> str:
    """Print the protocols and end, if that is what was asked for."""
    if value != "list" or context.resilient_parsing:
        return value
    from recmas_compiler.evaluation.data.protocol import load_protocol, protocol_names

    for name in protocol_names():
        protocol = load_protocol(name)
        first = protocol.description.replace("\n", " ").partition(". ")[0].rstrip(".")
        click.echo(f"{name:15} {protocol.check.kind:7} {first}.")
    raise click.exceptions.Exit(0)


@click.command("eval")
@BUNDLE
@click.option("--data", type=FILE, required=True, help="Records to ask.")
@click.option(
    "--protocol",
    required=True,
    is_eager=True,
    callback=list_protocols,
    metavar="NAME|FILE|list",
    help="How to ask and to check; `list` names those that come with recmas.",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    metavar="NAME",
    help="latent (the system itself), single, all-context, text, text@N, moa, moa@N, "
    "latentmas, looplm, null, shuffled, mean, untrained-links or textgrad; may be repeated  "
    "[default: latent].",
)
@click.option(
    "--untrained-bundle",
    "--frozen-bundle",  # the name of version 0.1
    type=FILE,
    help="The system with untrained links, for untrained-links.",
)
@click.option(
    "--score",
    type=click.Choice(["text", "candidates", "likelihood"]),
    help="What is judged: written text, the right answer's rank among candidates by likelihood, or "
    "its loss alone  [default: the protocol's].",
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
    "--out", type=FOLDER, help="Folder for answers and report  [default: out/SYSTEM-PROTOCOL]."
)
@click.option(
    "--skip-broken",
    is_flag=True,
    help="Leave records out whose own solution fails their tests; without it they are an error.",
)
@click.option(
    "--textgrad",
    "textgrad",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of --baseline textgrad: data=FILE, steps=N and more, which another KEY lists; may be "
    "repeated.",
)
@click.option("--resume", is_flag=True, help="Go on with the answers that are there.")
@TRACKER
@DEVICE
@THREADS
@QUIET
@command
def evaluate(
    bundle: Path,
    *,
    limit: int | None,
    seeds: str | None,
    score: str | None,
    overrides: tuple[str, ...],
    textgrad: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> Outcome:
    """Ask a BUNDLE, and baselines on its engines, the questions of a data set.

    The report says how often each is right, at what cost in tokens and time.
    """
    from recmas_compiler.evaluation.evaluate import EvalOptions, OtherSystem, option_overrides
    from recmas_compiler.evaluation.evaluate import evaluate as run_evaluation

    found = (*overrides, *option_overrides(limit, seeds, score))
    asked = EvalOptions(bundle=bundle, overrides=found, **options)
    progress = shown_progress(quiet=quiet)
    if TEXTGRAD not in asked.baselines:
        if textgrad:
            hint = f"Add --baseline {TEXTGRAD}."
            raise fail("RM506", f"--textgrad without --baseline {TEXTGRAD}", hint=hint)
        return shown(run_evaluation(asked, progress=progress))
    learned: list[TextGradients] = []

    def optimised() -> OtherSystem:
        learned.append(found := optimised_prompts(asked, textgrad, progress=progress))
        if found.interrupted:
            raise KeyboardInterrupt
        return OtherSystem(digest=found.digest, of=found.system)

    try:
        outcome = shown(run_evaluation(asked, progress=progress, others={TEXTGRAD: optimised}))
    except KeyboardInterrupt:
        if not learned:
            raise
        outcome = Outcome(text="Partial: the run was interrupted.", interrupted=True)
    (result,) = learned
    return replace(
        outcome,
        text=f"{outcome.text}\n\n{result.to_text()}",
        data={**outcome.data, "textgrad": result.to_json()},
    )


def optimised_prompts(
    asked: EvalOptions, given: tuple[str, ...], *, progress: Progress
) -> TextGradients:
    """Return what textual gradients make of the prompts of the text system, or made before."""
    from recmas_compiler.evaluation.evaluate import output_folder
    from recmas_compiler.text_gradients import OptimiseOptions, optimise, read_settings

    return optimise(
        OptimiseOptions(
            bundle=asked.bundle,
            protocol=asked.protocol,
            settings=read_settings(given),
            folder=output_folder(asked) / TEXTGRAD,
            test_data=asked.data,
            overrides=asked.overrides,
            resume=asked.resume,
            device=asked.device,
            threads=asked.threads,
        ),
        progress=progress,
    )


def shown(done: Evaluated) -> Outcome:
    """Return an evaluation as the command prints it."""
    from recmas_compiler.evaluation.report import comparison_text, report_head, report_table

    report = done.report
    parts = ["" if report.is_complete else "Partial: the run was interrupted."]
    parts += [f"{report_head(report)}.", report_table(report), comparison_text(report)]
    parts.append(f"Wrote {', '.join(map(str, done.written))}.")
    lines = [part for part in parts if part] if report.systems else ["No question was answered."]
    return Outcome(
        text="\n\n".join(lines),
        data=report.to_json(),
        problems=done.warnings,
        interrupted=done.interrupted,
    )
