"""`recmasc ir`: the program, at the end or after one pass."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import DUMP_IR, SET, SPEC, Outcome, command
from recmas_compiler.api import load_and_compile
from recmas_compiler.ir.printer import print_graph
from recmas_runtime.core.errors import fail


@click.command()
@SPEC
@SET
@click.option("--after", metavar="PASS", help="Print the IR as it is after this pass.")
@DUMP_IR
@command
def ir(spec: Path, overrides: tuple[str, ...], after: str | None, dump_ir: Path | None) -> Outcome:
    """Print the program IR."""
    program = load_and_compile(spec, overrides, dump_ir=dump_ir)
    names = [record.name for record in program.records]
    if after is None:
        text = str(program)
    elif after in names:
        text = print_graph(program.records[names.index(after)].after)
    else:
        raise fail(
            "RM506", f"no pass is called {after!r}", hint=f"The passes are {', '.join(names)}."
        )
    return Outcome(text=text, data={"ir": text}, problems=program.spec.warnings)
