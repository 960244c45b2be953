"""`recmasc import`: teams of other frameworks, and systems that others trained, into specs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import click

from recmas_cli.console import FILE, Outcome, command
from recmas_cli.released import import_released
from recmas_compiler.spec.document.places import is_file
from recmas_compiler.spec.document.problems import problem_at
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.files import check_free, placed_together
from recmas_runtime.core.text import counted, listed
from recmas_runtime.formats.messages import Carries
from recmas_runtime.formats.plan import MAX_LATENT_STEPS, MAX_ROUNDS

if TYPE_CHECKING:
    from recmas_compiler.importers.spec_text import Written
    from recmas_compiler.importers.team import Team

# As `recmasc init` has them.
_BACKBONE: Final = "builtin:smollm2-135m-instruct"
_GGUF: Final = "gguf:"


@click.group("import")
def import_() -> None:
    """Turn teams of other frameworks, and systems that others trained, into specs."""


import_.add_command(import_released)

_OPTIONS: Final = (
    click.option(
        "-o",
        "--out",
        type=FILE,
        default=Path("spec.yaml"),
        show_default=True,
        help="The spec to write; its JSON schema lands beside it.",
    ),
    click.option(
        "--backbone",
        default=_BACKBONE,
        show_default=True,
        help="The language model of all agents: builtin:NAME, hf:ORG/NAME@REVISION, gguf:FILE or "
        "a folder.",
    ),
    click.option(
        "--latent-steps",
        type=click.IntRange(0, MAX_LATENT_STEPS),
        default=16,
        show_default=True,
        help="Thoughts per message, where links carry thoughts.",
    ),
    click.option(
        "--carries",
        type=click.Choice(get_args(Carries)),
        default="cache",
        show_default=True,
        help="What links carry; untrained, only cache and text are of use.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(1, MAX_ROUNDS),
        metavar="N",
        help="Passes over the agents  [default: as the team's files say, or 1].",
    ),
    click.option("--force", is_flag=True, help="Overwrite existing files."),
)
_PROMPTS: Final = click.option(
    "--prompts",
    type=FILE,
    help="YAML with a text for each agent, or {system, prompt, expected}.",
)


def _team_command(run: Callable[..., Outcome]) -> Callable[..., int]:
    for option in reversed(_OPTIONS):
        run = option(run)
    return command(run)


@import_.command("crewai", short_help="A crew or flow of CrewAI.")
@click.argument("folder", type=FILE)
@_team_command
def import_crewai(folder: Path, **options: Any) -> Outcome:
    """Turn a crew or flow of CrewAI into a spec.

    FOLDER has agents.yaml and tasks.yaml (in config, with crew.py or without), crew.jsonc or
    flow.yaml. Code is never run.
    """
    from recmas_compiler.importers.readers.crewai import read

    return _written(read(folder), **options)


@import_.command("adk", short_help="An agent of Google's ADK.")
@click.argument("file", type=FILE)
@_team_command
def import_adk(file: Path, **options: Any) -> Outcome:
    """Turn an agent of Google's ADK, root_agent.yaml and the files it names, into a spec."""
    from recmas_compiler.importers.readers.adk import read

    return _written(read(file), **options)


@import_.command("autogen", short_help="A team of AutoGen.")
@click.argument("file", type=FILE)
@_team_command
def import_autogen(file: Path, **options: Any) -> Outcome:
    """Turn a team of AutoGen, as dump_component writes it, into a spec."""
    from recmas_compiler.importers.readers.autogen import read

    return _written(read(file), **options)


@import_.command("langgraph", short_help="A graph of LangGraph.")
@click.argument("file", type=FILE)
@_PROMPTS
@_team_command
def import_langgraph(file: Path, prompts: Path | None, **options: Any) -> Outcome:
    """Turn a graph of LangGraph, the JSON of get_graph().to_json(), into a spec.

    The dump has no prompts: --prompts has them, or they stand to be filled in.
    """
    from recmas_compiler.importers.readers.langgraph import read

    return _written(read(file, prompts=prompts), **options)


@import_.command("agent-framework", short_help="A workflow of Microsoft's Agent Framework.")
@click.argument("file", type=FILE)
@_PROMPTS
@_team_command
def import_agent_framework(file: Path, prompts: Path | None, **options: Any) -> Outcome:
    """Turn a declarative workflow or agent of the Microsoft Agent Framework into a spec.

    Prompts come from --prompts, from files beside it with `kind: Prompt`, or stand to be filled in.
    """
    from recmas_compiler.importers.readers.agent_framework import read

    return _written(read(file, prompts=prompts), **options)


def _written(
    team: Team,
    *,
    out: Path,
    backbone: str,
    latent_steps: int,
    carries: Carries,
    rounds: int | None,
    force: bool,
) -> Outcome:
    """Write the spec of a team, and tell what became of its files' keys."""
    from recmas_compiler.importers.spec_text import ImportOptions, write_spec
    from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text

    if not out.name:
        raise fail("RM302", f"{out} is a folder", hint="Name a file, such as -o spec.yaml.")
    options = ImportOptions(
        backbone=_from_folder_of(out, backbone),
        latent_steps=latent_steps,
        carries=carries,
        rounds=rounds,
    )
    written = write_spec(team, options, out=out)
    files = {SCHEMA_FILE: schema_text(), out.name: written.text}
    theirs = [name for name in files if name != SCHEMA_FILE or not is_file(out.with_name(name))]
    check_free(out.parent, theirs, force=force)
    with placed_together(out.parent, list(files)) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
    return Outcome(
        text=_text(team, written, out),
        data=_data(team, written, out),
        problems=(*_problems(team), *written.to_fill, *written.warnings),
    )


def _from_folder_of(out: Path, backbone: str) -> str:
    """Return the source as the spec names it: paths of the command line start elsewhere."""
    prefix = _GGUF if backbone.startswith(_GGUF) else ""
    path = backbone.removeprefix(prefix)
    if not Path(path).exists() or Path(path).is_absolute():
        return backbone
    return prefix + os.path.relpath(path, out.parent)


def _problems(team: Team) -> Iterator[Problem]:
    for place, message in team.remarks:
        yield problem_at(place, "RM167", f"{message}.", severity="warning")
    for left in team.left_out:
        message = f"`{left.key}` is not carried over: {left.reason}."
        yield problem_at(left.place, "RM165", message, severity="warning")


def _text(team: Team, written: Written, out: Path) -> str:
    sizes = [
        counted(len(team.agents), "agent"),
        counted(written.num_links, "link"),
        counted(written.rounds, "round"),
    ]
    keys = f"{counted(team.num_carried, 'key')} carried over, {len(team.left_out)} not"
    head = f"Wrote {out} from {team.form}: {listed(sizes)}; {keys}."
    if not written.to_fill:
        return f"{head}\nNext: recmasc check {out}, then recmasc build {out}."
    lines = [f"  {problem.file}:{problem.line}:{problem.column}" for problem in written.to_fill]
    places = counted(len(lines), "place")
    return "\n".join([head, f"Fill in {places}, then recmasc check {out}:", *lines])


def _data(team: Team, written: Written, out: Path) -> dict[str, Any]:
    return {
        "path": str(out),
        "form": team.form,
        "files": list(team.files),
        "agents": {agent.name: [str(place) for place in agent.places] for agent in team.agents},
        "answer": team.answer,
        "links": written.num_links,
        "rounds": written.rounds,
        "fields": list(written.fields),
        "carried": team.num_carried,
        "left_out": [
            {
                "key": left.key,
                "file": left.place.file,
                "line": left.place.line,
                "column": left.place.column,
                "reason": left.reason,
            }
            for left in team.left_out
        ],
        "to_fill": [{"line": p.line, "column": p.column} for p in written.to_fill],
    }
