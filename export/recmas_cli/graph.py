"""`recmasc graph`: a drawing."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import FILE, SET, SPEC, Outcome, command, write_text
from recmas_compiler.analysis.draw import program_mermaid, topology_mermaid, topology_svg
from recmas_compiler.api import load_and_compile
from recmas_runtime.core.errors import fail


@click.command()
@SPEC
@SET
@click.option(
    "-o", "--out", type=FILE, help="File to write: .svg or .mmd; Mermaid on stdout without it."
)
@click.option(
    "--program", "unrolled", is_flag=True, help="Draw the unrolled program instead (Mermaid only)."
)
@command
def graph(spec: Path, overrides: tuple[str, ...], out: Path | None, *, unrolled: bool) -> Outcome:
    """Draw the topology as SVG or Mermaid."""
    program = load_and_compile(spec, overrides)
    warnings = program.spec.warnings
    mermaid = program_mermaid(program.graph) if unrolled else topology_mermaid(program.topology)
    if out is None:
        return Outcome(text=mermaid, data={"mermaid": mermaid}, problems=warnings)
    match out.suffix:
        case ".svg" if not unrolled:
            drawing = topology_svg(program.topology)
        case ".mmd" | ".md":
            drawing = mermaid
        case suffix:
            raise fail(
                "RM506",
                f"cannot draw {'a program' if unrolled else 'a topology'} as {suffix or 'no'} file",
                hint="Use .svg or .mmd for topologies and .mmd for programs.",
            )
    write_text(out, drawing)
    return Outcome(text=f"Wrote {out}.", data={"path": str(out)}, problems=warnings)
