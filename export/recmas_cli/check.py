"""`recmasc check`: everything that is wrong with a spec."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import OFFLINE, SET, SPEC, Outcome, command
from recmas_compiler.analysis.explain import conversation_text
from recmas_compiler.api import load_and_compile, with_trained_links
from recmas_runtime.core.text import counted


@click.command()
@SPEC
@SET
@OFFLINE
@command
def check(spec: Path, overrides: tuple[str, ...], *, offline: bool) -> Outcome:
    """Check a spec: syntax, names, slots, links, widths. Loads no weights."""
    program = with_trained_links(load_and_compile(spec, overrides, offline=offline))
    trained = program.trained
    system = program.graph.system
    counts = {
        "agents": len(system.agents),
        "links": len(system.links),
        "rounds": system.rounds,
        "steps": len(program.graph),
    }
    listed = ", ".join(counted(value, key.removesuffix("s")) for key, value in counts.items())
    chat = conversation_text(system)
    lines = [f"{spec}: ok ({listed})", *([chat] if chat else [])]
    return Outcome(
        text="".join(f"{line}\n" for line in lines) + ("" if trained is None else trained.text),
        data={
            "name": system.name,
            **counts,
            "trained_links": [] if trained is None else list(trained.used),
        },
        problems=program.spec.warnings,
    )
