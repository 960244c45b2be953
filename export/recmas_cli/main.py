"""`recmasc`: the compiler's command line. Heavy packages load only where they are needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from recmas_cli import commands
from recmas_cli.cli_measure import bench, evaluate
from recmas_cli.cli_released import export_links, import_
from recmas_cli.console import Outcome, command, report
from recmas_cli.options import DUMP_IR, QUIET, SET, SPEC
from recmas_runtime.core.errors import Exit, fail
from recmas_runtime.core.terminal import lasting_interrupts


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recmas", prog_name="recmasc")
def group() -> None:
    """Compile latent multi-agent systems: YAML spec -> checked program -> engines and bundle."""


@group.command()
@click.argument("pattern")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("spec.yaml"))
@click.option(
    "--task", metavar="TASK", help="What to ask for: general, math, choice, code or search."
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@command
def init(pattern: str, out: Path, task: str | None, *, force: bool) -> Outcome:
    """Write a commented spec to start from.

    PATTERN is sequential, mixture, distillation, deliberation, or custom for a graph of your own.
    """
    return commands.init(pattern, out, task=task, force=force)


@group.command()
@SPEC
@SET
@command
def check(spec: Path, overrides: tuple[str, ...]) -> Outcome:
    """Check a spec: syntax, names, slots, links, widths. Loads no weights."""
    return commands.check(spec, overrides)


@group.command()
@SPEC
@SET
@command
def explain(spec: Path, overrides: tuple[str, ...]) -> Outcome:
    """Print the expanded spec and what each pass changes, in words."""
    return commands.explain(spec, overrides)


@group.command()
@SPEC
@SET
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of every prompt, messages included  [default: build.max_prompt_tokens].",
)
@command
def plan(spec: Path, overrides: tuple[str, ...], prompt_tokens: int | None) -> Outcome:
    """Print the memory that the system needs: weights, caches, prompts, per batch."""
    return commands.plan(spec, overrides, prompt_tokens=prompt_tokens)


@group.command()
@SPEC
@SET
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="File to write: .svg or .mmd; Mermaid on stdout without it.",
)
@click.option("--program", is_flag=True, help="Draw the unrolled program instead (Mermaid only).")
@command
def graph(spec: Path, overrides: tuple[str, ...], out: Path | None, *, program: bool) -> Outcome:
    """Draw the topology as SVG or Mermaid."""
    return commands.graph(spec, overrides, out, program=program)


@group.command()
@SPEC
@SET
@click.option("--after", metavar="PASS", help="Print the IR as it is after this pass.")
@DUMP_IR
@command
def ir(spec: Path, overrides: tuple[str, ...], after: str | None, dump_ir: Path | None) -> Outcome:
    """Print the program IR."""
    return commands.ir(spec, overrides, after=after, dump_ir=dump_ir)


@group.command()
@SPEC
@SET
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="The bundle's folder [default: out/NAME]."
)
@click.option(
    "--target",
    type=click.Choice(["onnx", "tensorrt"]),
    help="Kind of engine, instead of the spec's build.target.",
)
@click.option("--force", is_flag=True, help="Build even if the bundle is there and current.")
@click.option(
    "--frozen-links",
    "frozen",
    is_flag=True,
    help="Give trained links their untrained start instead, to compare with.",
)
@DUMP_IR
@QUIET
@command
def build(
    spec: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    dump_ir: Path | None,
    *,
    target: str | None,
    force: bool,
    frozen: bool,
    quiet: bool,
) -> Outcome:
    """Export engines, check them against the reference, write a bundle."""
    if target is not None:
        overrides = (*overrides, f"build.target={target}")
    return commands.build(
        spec, overrides, out, dump_ir=dump_ir, force=force, quiet=quiet, frozen=frozen
    )


@group.command()
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
def train(spec: Path, overrides: tuple[str, ...], steps: int | None, **options: Any) -> Outcome:
    """Train the links of a SPEC with a `train` section; the backbones never change."""
    stages = ("inner", "outer") if steps is not None else ()
    found = (*overrides, *(f"train.{stage}.steps={steps}" for stage in stages))
    return commands.train(spec, found, arguments=sys.argv[2:], **options)


@group.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(source: Path, arguments: tuple[str, ...]) -> None:
    """Run a SPEC (built first into out/NAME if need be) or a bundle.

    ARGUMENTS are those of `recmas run`; `recmas run --help` lists them.
    """
    sys.exit(commands.run(source, arguments))


@group.command()
@command
def doctor() -> Outcome:
    """Tell what this machine has: packages, versions, memory, disk, embedded model."""
    return commands.doctor()


for elsewhere in (evaluate, bench, import_, export_links):
    group.add_command(elsewhere)


def main(arguments: list[str] | None = None) -> None:
    """Run `recmasc`; exits with the codes of `recmas_runtime.core.errors.Exit`."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with lasting_interrupts():
            status: Any = group.main(args=given, prog_name="recmasc", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(Exit.USAGE)
    except click.ClickException as error:
        problem = fail("RM506", error.format_message(), hint="See `recmasc --help`.")
        report(problem.problems, as_json="--json" in given)
        sys.exit(Exit.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(Exit.INTERRUPTED)
    sys.exit(status if isinstance(status, int) else Exit.OK)


if __name__ == "__main__":
    main()
