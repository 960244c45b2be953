"""What the command line shows: one outcome on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from recmas_runtime.core.errors import Exit, Problem, RecmasError
from recmas_runtime.core.progress import Advance, Silent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command found out.

    Attributes:
        text: For people, printed on stdout.
        data: For programs, the `data` of `--json`.
        problems: Warnings; errors are raised.
        interrupted: Whether the user stopped it, and this is what there is so far.
    """

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    interrupted: bool = False


def envelope(*, ok: bool, data: Mapping[str, Any] | None, problems: tuple[Problem, ...]) -> str:
    """Return the one JSON object that `--json` prints, for success and failure alike."""
    body = {"ok": ok, "data": data, "problems": [p.to_json() for p in problems]}
    return json.dumps(body, ensure_ascii=False)


def command(run: Callable[..., Outcome]) -> Callable[..., None]:
    """Give a function that returns an `Outcome` the options `--json` and `--debug`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @functools.wraps(run)
    def wrapped(*, as_json: bool, debug: bool, **arguments: Any) -> None:
        try:
            outcome = run(**arguments)
        except RecmasError as error:
            if debug:
                traceback.print_exc()
            report(error.problems, as_json=as_json)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(Exit.INTERRUPTED)
        except BrokenPipeError:
            sys.exit(Exit.OK)
        except Exception as error:
            if debug:
                raise
            click.echo(
                f"internal error: {type(error).__name__}: {error}\n"
                "This is a bug in recmas. Run again with --debug and report what it prints.",
                err=True,
            )
            if as_json:
                click.echo(envelope(ok=False, data=None, problems=()))
            sys.exit(Exit.RUN_FAILED)
        if as_json:
            ok = not outcome.interrupted
            click.echo(envelope(ok=ok, data=outcome.data, problems=outcome.problems))
        else:
            for problem in outcome.problems:
                click.echo(str(problem), err=True)
            if outcome.text:
                click.echo(outcome.text.rstrip("\n"))
        if outcome.interrupted:
            click.echo("interrupted", err=True)
            sys.exit(Exit.INTERRUPTED)

    return wrapped


def report(problems: tuple[Problem, ...], *, as_json: bool) -> None:
    """Print problems: as an envelope on stdout, or as lines on stderr."""
    if as_json:
        click.echo(envelope(ok=False, data=None, problems=problems))
        return
    for problem in problems:
        click.echo(str(problem), err=True)


class RichProgress:
    """Progress bars on stderr; plain lines where stderr is not a terminal."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Show one stage until the context is left; the yielded function advances it."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
        from rich.progress import Progress as Bars

        console = Console(stderr=True)
        if not console.is_terminal:
            click.echo(f"{title} ...", err=True)
            with Silent().stage(title, total) as advance:
                yield advance
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn()]
        with Bars(*columns, TimeElapsedColumn(), console=console) as bars:
            task = bars.add_task(title, total=total)

            def count(num_units: int = 1, /) -> None:
                bars.advance(task, num_units)

            yield count
            bars.update(task, completed=total if total is not None else 1, total=total or 1)
