"""`recmasc`: the compiler's command line. Heavy packages load only where they are needed."""

from __future__ import annotations

import sys
from typing import Any

import click

from recmas_cli.bench import bench
from recmas_cli.build import build
from recmas_cli.check import check
from recmas_cli.console import report
from recmas_cli.doctor import doctor
from recmas_cli.evaluate import evaluate
from recmas_cli.explain import explain
from recmas_cli.graph import graph
from recmas_cli.init import init
from recmas_cli.ir import ir
from recmas_cli.plan import plan
from recmas_cli.released import export_links, import_
from recmas_cli.run import run
from recmas_cli.train import train
from recmas_runtime.core.errors import Exit, fail
from recmas_runtime.core.terminal import (
    end_signals_interrupt,
    lasting_interrupts,
    open_standard_streams,
)

# In the order of `recmasc --help`'s reader: from a spec to a bundle, then what is measured.
COMMANDS = (
    init,
    check,
    explain,
    plan,
    graph,
    ir,
    build,
    train,
    run,
    evaluate,
    bench,
    import_,
    export_links,
    doctor,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="recmas", prog_name="recmasc")
def group() -> None:
    """Compile latent multi-agent systems: YAML spec -> checked program -> engines and bundle."""


for each in COMMANDS:
    group.add_command(each)


def main(arguments: list[str] | None = None) -> None:
    """Run `recmasc`; exits with the codes of `recmas_runtime.core.errors.Exit`."""
    open_standard_streams()
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with end_signals_interrupt(), lasting_interrupts():
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
