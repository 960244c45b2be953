"""`recmasc plan`: the memory that a system needs."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import SET, SPEC, Outcome, command
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.api import load_and_compile


@click.command()
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
    program = load_and_compile(spec, overrides)
    memory = memory_plan(program.graph, prompt_tokens=prompt_tokens)
    return Outcome(text=str(memory), data=memory.to_json(), problems=program.spec.warnings)
