"""Every command line in documents, examples and the Makefile names options that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from recmas_cli.commands import group
from recmas_runtime.cli.main import _parse

ROOT = Path(__file__).parents[2]
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "specs" / "README.md",
    *sorted((ROOT / "examples").rglob("*.sh")),
    ROOT / "Makefile",
)
# In tables and prose a name stands for many: `recmas run BUNDLE ...` is no line to type.
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```|^$\n((?:^ {4}\S.*\n)+)", re.M | re.S)


def lines_of(page: Path) -> Iterator[list[str]]:
    """Yield the words of every line that begins with one of our programs."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        text = "\n".join("".join(found) for found in BLOCK.findall(text))
    text = text.replace("$(BIN)/", "").replace("\\\n", " ")
    for line in text.splitlines():
        line = re.split(r" [|>&] ?", line.strip())[0]
        if re.match(r"recmasc? (?!runs )[a-z-]", line):  # not "recmas runs as root"
            yield shlex.split(line, comments=True)


def test_there_are_such_lines() -> None:
    assert sum(1 for page in PAGES for _ in lines_of(page)) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page: Path) -> None:
    for program, *arguments in lines_of(page):
        if program == "recmas":
            _parse(arguments)
        else:
            check_recmasc(group, arguments)


def check_recmasc(command: click.Command, arguments: list[str]) -> None:
    """Parse a line without running it."""
    context = click.Context(command, info_name=command.name, allow_interspersed_args=True)
    context.resilient_parsing = True
    if isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *rest = arguments
        default = getattr(command, "default", None)
        found = command.get_command(context, name)
        if found is None:
            assert default is not None, f"no command {name!r}"
            found, rest = command.get_command(context, default), arguments
        assert found is not None
        check_recmasc(found, rest)
        return
    if command.name == "run":  # takes what `recmas run` takes
        _parse(["run", *arguments])
        return
    command.make_parser(context).parse_args(list(arguments))
