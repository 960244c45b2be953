"""The pages of the two programs, made from what they print as help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import click

from recmas_cli.commands import COMMANDS, group
from recmas_runtime.cli.main import command_parser

_JSON = (
    "Every command takes `--json` (one object on standard output, its problems included), "
    "`--debug` (tracebacks) and `--help`."
)
# Said once, at the top of the page.
_EVERYWHERE = ("--json", "--debug", "--help", "-h")


def pages() -> dict[str, str]:
    """Return the page of each program, by name."""
    return {"recmasc.md": _recmasc(), "recmas.md": _recmas()}


def _recmasc() -> str:
    about = "The compiler. It comes with the extra `compile`, and with none it says what it lacks."
    lines = [*_head("recmasc", about), "| command | |", "|---|---|"]
    lines += [f"| [`{name}`](#recmasc-{name}) | {e.about} |" for name, e in COMMANDS.items()]
    context = click.Context(group, info_name="recmasc")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        lines += _click_command(command, name, context)
    return "\n".join(lines) + "\n"


def _click_command(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    """Yield the section of a command, and those of its own commands."""
    context = click.Context(command, info_name=name, parent=parent)
    yield from _section(context.command_path, command.get_usage(context), command.help or "")
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None and param.opts[0] not in _EVERYWHERE:
            kind = "argument " if isinstance(param, click.Argument) else ""
            anchor = _anchor(context.command_path, kind + param.opts[0])
            yield from _entry(anchor, record[0], record[1])
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from _click_command(found, child, context)


def _recmas() -> str:
    about = "What runs bundles. It needs neither the compiler nor torch."
    lines = [*_head("recmas", about), "| command | |", "|---|---|"]
    parser = command_parser(serves=True)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for choice in commands._choices_actions:
        lines.append(f"| [`{choice.dest}`](#recmas-{choice.dest}) | {choice.help} |")
    for child in commands.choices.values():
        lines += _section(child.prog, child.format_usage(), child.description or "")
        for part in child._action_groups:
            if part.title not in (None, "options", "positional arguments") and part._group_actions:
                lines += [f"**{part.title[:1].upper()}{part.title[1:]}**", ""]
            for action in part._group_actions:
                if _names(action)[0] in _EVERYWHERE:
                    continue
                told = (action.help or "") % {"default": action.default, "prog": child.prog}
                lines += _entry(_anchor(child.prog, _names(action)[0]), _invocation(action), told)
    return "\n".join(lines) + "\n"


def _names(action: argparse.Action) -> list[str]:
    return list(action.option_strings) or [str(action.metavar or action.dest)]


def _invocation(action: argparse.Action) -> str:
    """Return an option's names and its value, as its help has them."""
    names = _names(action)
    if not action.option_strings or action.nargs == 0:
        return ", ".join(names)
    value = action.metavar or f"[{'|'.join(map(str, action.choices or (action.dest,)))}]"
    return f"{', '.join(names)} {f'[{value}]' if action.nargs == '?' else value}"


def _head(program: str, about: str) -> list[str]:
    statuses = "Exit statuses are in [Error codes](errors.md#exit-statuses)."
    return [f"# The command line `{program}`", "", f"{about} {_JSON} {statuses}", ""]


def _section(path: str, usage: str, about: str) -> list[str]:
    usage = re.sub(r"^[Uu]sage: ", "", usage.strip())
    text = re.sub(r"\n\s*", "\n", about.replace("\b", "").strip())
    # Angles and braces of help texts are no HTML.
    return ["", f"## `{path}`", "", "```text", usage, "```", "", _escaped(text), ""]


def _entry(anchor: str, names: str, about: str) -> list[str]:
    return [f"[`{names}`]{{#{anchor}}}", f": {_escaped(about) or '-'}", ""]


def _anchor(path: str, name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{path} {name}".lower()).strip("-")


def _escaped(text: str) -> str:
    """Return help as Markdown: quoted code stays, other marks are text."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<>*_\[\]])", r"\\\1", p) for p in parts)
