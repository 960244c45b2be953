"""The commands of `recmasc`: one table, and a group that imports the command that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, NamedTuple

import click
from click.shell_completion import CompletionItem, get_completion_class

from recmas_cli.printing import lose_output, note, report, show
from recmas_runtime.core.errors import Exit, fail
from recmas_runtime.core.terminal import end_signals_interrupt, lasting_interrupts


class Entry(NamedTuple):
    """Where a command is, and its line in `recmasc --help`."""

    module: str
    attribute: str
    about: str


# From a spec to a bundle, then what is measured, then the rest.
COMMANDS: Final = {
    "init": Entry("init", "init", "Write a commented spec to start from."),
    "check": Entry("check", "check", "Tell all that is wrong with a spec; loads no weights."),
    "explain": Entry("explain", "explain", "Print the expanded spec and what each pass does."),
    "plan": Entry("plan", "plan", "Print the memory that a system needs."),
    "graph": Entry("graph", "graph", "Draw a system as SVG or Mermaid."),
    "ir": Entry("ir", "ir", "Print the program, at the end or after one pass."),
    "build": Entry("build", "build", "Export engines, check them, write a bundle."),
    "cache": Entry("cache", "cache", "Show or shrink what builds keep for later ones."),
    "train": Entry("train", "train", "Train the links of a system."),
    "run": Entry("run", "run", "Run a bundle, or a spec that is built first."),
    "data": Entry("data", "data", "Write a published data set as JSON lines."),
    "eval": Entry("evaluate", "evaluate", "Measure how often a system is right, and its cost."),
    "bench": Entry(
        "bench", "bench", "Measure a system, its engines, or what can learn from its data."
    ),
    "import": Entry("importing", "import_", "Turn teams and systems of others into specs."),
    "export-links": Entry("released", "export_links", "Write trained links in the released form."),
    "doctor": Entry("doctor", "doctor", "Tell what this machine has and what works on it."),
}
# Shells whose completion click writes.
SHELLS: Final = ("bash", "zsh", "fish")


class _Commands(click.Group):
    """A group that knows names and lines of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        command: click.Command = getattr(
            import_module(f"recmas_cli.{entry.module}"), entry.attribute
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.about) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        begun = {name: e for name, e in COMMANDS.items() if name.startswith(incomplete)}
        return [CompletionItem(name, help=entry.about) for name, entry in begun.items()]


def _write_completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell is None or ctx.resilient_parsing:
        return
    kind = get_completion_class(shell)
    assert kind is not None
    show(kind(group, {}, "recmasc", "_RECMASC_COMPLETE").source())
    ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recmas", prog_name="recmasc")
@click.option(
    "--completion",
    type=click.Choice(SHELLS),
    is_eager=True,
    expose_value=False,
    callback=_write_completion,
    help='Print what completes commands and options: eval "$(recmasc --completion bash)".',
)
def group() -> None:
    """Compile latent multi-agent systems: YAML spec -> checked program -> engines and bundle."""


def run(given: list[str]) -> int:
    """Run `recmasc` with arguments and return its exit status.

    Raises:
        ModuleNotFoundError: Of a package that comes with an extra.
    """
    call: Callable[..., Any] = group.main
    try:
        with end_signals_interrupt(), lasting_interrupts():
            status = call(args=given, prog_name="recmasc", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        note(error.format_message())
        return Exit.USAGE
    except click.ClickException as error:
        asked = getattr(error, "ctx", None)
        path = "recmasc" if asked is None else asked.command_path
        problem = fail("RM506", error.format_message(), hint=f"See `{path} --help`.")
        report(problem.problems, as_json="--json" in given)
        return Exit.USAGE
    except click.Abort:
        raise KeyboardInterrupt from None
    except OSError as error:  # of help and versions, which click prints
        lose_output(error)
    return status if isinstance(status, int) else Exit.OK
