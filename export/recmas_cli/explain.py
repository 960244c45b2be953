"""`recmasc explain`: what a spec expands to and what each pass does, in words."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import SET, SPEC, Outcome, command
from recmas_compiler.analysis.explain import explain as explain_program
from recmas_compiler.analysis.token_count import TokenCounter
from recmas_compiler.api import load_and_compile, with_trained_links


@click.command()
@SPEC
@SET
@command
def explain(spec: Path, overrides: tuple[str, ...]) -> Outcome:
    """Print the expanded spec and what each pass changes, in words."""
    program = load_and_compile(spec, overrides)
    counter = TokenCounter(program.topology.system)
    text = explain_program(program.topology, program.records, count_tokens=counter)
    expanded = program.spec.resolved_yaml()
    as_built = with_trained_links(program)
    trained = as_built.trained
    links = "" if trained is None else f"\n{trained.text}"
    return Outcome(
        text=f"# The spec, expanded\n\n{expanded}\n# What the passes do\n\n{text}{links}",
        data={
            "spec": expanded,
            "explanation": text,
            "trained_links": [] if trained is None else list(trained.used),
        },
        problems=as_built.spec.warnings,
    )
