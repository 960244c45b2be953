"""What needs a spec and no weights: `recmasc init`, `check`, `explain`, `plan`, `graph`, `ir`."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import DUMP_IR, FILE, SET, SPEC, Outcome, command, write_text
from recmas_compiler.analysis.draw import program_mermaid, topology_mermaid, topology_svg
from recmas_compiler.analysis.explain import explain as explain_program
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.analysis.token_count import TokenCounter
from recmas_compiler.api import load_and_compile
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text
from recmas_runtime.core.errors import fail


@click.command()
@click.argument("pattern")
@click.option("-o", "--out", type=FILE, default=Path("spec.yaml"))
@click.option(
    "--task", metavar="TASK", help="What to ask for: general, math, choice, code or search."
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@command
def init(pattern: str, out: Path, task: str | None, *, force: bool) -> Outcome:
    """Write a commented spec to start from.

    PATTERN is sequential, mixture, distillation, deliberation, or custom for a graph of your own.
    """
    text = starter_spec(pattern, task=task)
    if out.exists() and not force:
        raise fail("RM302", f"{out} exists already", hint="Choose another --out or pass --force.")
    schema = out.with_name(SCHEMA_FILE)
    write_text(out, text)
    write_text(schema, schema_text())
    return Outcome(
        text=f"Wrote {out} and {schema} (for editors).\n"
        f"Next: recmasc check {out}, then recmasc build {out}.",
        data={"path": str(out), "schema": str(schema)},
    )


@click.command()
@SPEC
@SET
@command
def check(spec: Path, overrides: tuple[str, ...]) -> Outcome:
    """Check a spec: syntax, names, slots, links, widths. Loads no weights."""
    program = load_and_compile(spec, overrides)
    system = program.graph.system
    counts = {
        "agents": len(system.agents),
        "links": len(system.links),
        "rounds": system.rounds,
        "steps": len(program.graph),
    }
    listed = ", ".join(f"{value} {key}" for key, value in counts.items())
    return Outcome(
        text=f"{spec}: ok ({listed})",
        data={"name": system.name, **counts},
        problems=program.spec.warnings,
    )


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
    return Outcome(
        text=f"# The spec, expanded\n\n{expanded}\n# What the passes do\n\n{text}",
        data={"spec": expanded, "explanation": text},
        problems=program.spec.warnings,
    )


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
