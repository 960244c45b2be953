"""What all commands share: arguments, one outcome on stdout, everything else on stderr."""

from __future__ import annotations

import functools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from recmas_cli.printing import envelope, report, show
from recmas_cli.printing import note as note_line
from recmas_runtime.core.errors import (
    Exit,
    Problem,
    RecmasError,
    fail,
    is_out_of_memory,
    missing_package,
)
from recmas_runtime.core.files import write_whole
from recmas_runtime.core.progress import Advance, Progress, Silent
from recmas_runtime.core.terminal import harmless
from recmas_runtime.core.text import first_line
from recmas_runtime.engines.devices import DeviceChoice
from recmas_runtime.formats.precisions import AUTO, DEVICES

# Where nobody watches a bar, a line now and then shows that it is alive.
LINE_EVERY_S: Final = 30.0

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)

SPEC = click.argument("spec", type=FILE)
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY.PATH=VALUE",
    help="Override a key of the spec; may be repeated.",
)
TRACKER = click.option(
    "--tracker",
    "trackers",
    multiple=True,
    metavar="NAME[=PLACE]",
    help="Write figures, settings and results for tensorboard, wandb (offline), mlflow or trackio, "
    "into a folder of --out or the named one; may be repeated.",
)
OFFLINE = click.option(
    "--offline",
    is_flag=True,
    help="Never use the network: `hf:` backbones must be whole in the local cache.",
)
DUMP_IR = click.option(
    "--dump-ir", type=FOLDER, help="Write the IR after every pass into this folder."
)
QUIET = click.option("--quiet", is_flag=True, help="No progress on stderr.")


def _joined_devices(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> str:
    try:
        DeviceChoice.parse(text := ",".join(given))
    except RecmasError as error:
        (problem,) = error.problems
        raise click.BadParameter(f"{problem.message}. {problem.hint}") from None
    return text


DEVICE = click.option(
    "--device",
    multiple=True,
    default=[AUTO],
    callback=_joined_devices,
    metavar="[BACKBONE=]DEVICE",
    help=f"Where to run: {', '.join(DEVICES)}, or cuda:1 for the second GPU. auto, the default, "
    "takes what the bundle says of a backbone, or the best that is there. May be repeated.",
)
THREADS = click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Threads of the CPU  [default: physical cores].",
)
BUNDLE = click.argument("bundle", type=FILE)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command found out; what there is so far, if the user interrupted it."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    interrupted: bool = False


def command(run: Callable[..., Outcome]) -> Callable[..., int]:
    """Give a function that returns an `Outcome` the options `--json` and `--debug`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("--debug", is_flag=True, help="Show tracebacks.")
    @functools.wraps(run)
    def wrapped(*, as_json: bool, debug: bool, **arguments: Any) -> int:
        try:
            with _told():
                outcome = run(**arguments)
        except RecmasError as error:
            if debug:
                traceback.print_exc()
            report(error.problems, as_json=as_json)
            return error.exit_code
        except (KeyboardInterrupt, SystemExit):
            raise
        # A bug of ours, or of a library: some that are not written in Python raise BaseExceptions.
        except BaseException as error:
            if debug:
                traceback.print_exc()
            note_line(
                f"internal error: {type(error).__name__}: {error}\n"
                "This is a bug in recmas. Run again with --debug and report what it prints."
            )
            if as_json:
                show(envelope(ok=False, data=None, problems=()))
            return Exit.RUN_FAILED
        if as_json:
            ok = not outcome.interrupted
            show(envelope(ok=ok, data=outcome.data, problems=outcome.problems))
        else:
            for problem in outcome.problems:
                note_line(str(problem))
            if outcome.text:
                show(harmless(outcome.text.rstrip("\n")))
        if outcome.interrupted:
            note_line("interrupted")
            return Exit.INTERRUPTED
        return Exit.OK

    return wrapped


@contextmanager
def _told() -> Iterator[None]:
    """Tell in recmas's words what the machine refuses: a package, a file, a place."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing_package(error) from error
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            hint = "Free memory, or choose smaller backbones or limits."
            raise fail("RM702", f"memory ran out: {first_line(error)}", hint=hint) from error
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        where = "" if error.filename is None else f" {os.fsdecode(error.filename)}"
        hint = "Choose another place, or make room."
        raise fail("RM303", f"cannot read or write{where}: {reason}", hint=hint) from error
    except RecmasError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        hint = "Free memory, lower the batch, or take a smaller backbone or precision."
        raise fail("RM507", "memory runs out", hint=hint) from error


class RichProgress:
    """Bars on stderr; where that is no terminal, a line at the start and one now and then."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        """Show one stage until the context is left; the yielded function advances it."""
        from rich.console import Console

        console = Console(stderr=True)
        show = self._bar if console.is_terminal else self._lines
        with show(title, total, done) as advance:
            yield advance

    @contextmanager
    def _bar(self, title: str, total: int | None, done: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        # Titles and notes hold names from specs: they are text, not markup, and steer no terminal.
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn()]
        if total is not None:
            columns.append(TimeRemainingColumn())
        # The usual half minute forgets what is rare and slow, such as measurements of a training.
        with Bars(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bars:
            task = bars.add_task(harmless(title), total=total, completed=done, note="")

            def advance(num_units: int = 1, /, *, note: str = "") -> None:
                bars.update(task, advance=num_units, note=harmless(note))

            yield advance
            if total is None:  # a spinner ends as a full bar of one
                bars.update(task, completed=1, total=1)

    @contextmanager
    def _lines(self, title: str, total: int | None, done: int) -> Iterator[Advance]:
        note_line(f"{title} ...")
        started = shown = self._clock()
        counted, noted = done, ""

        def advance(num_units: int = 1, /, *, note: str = "") -> None:
            nonlocal counted, shown, noted
            counted, noted = counted + num_units, note
            now = self._clock()
            if now - shown < LINE_EVERY_S or total is None or counted == done:
                return
            shown = now
            left_s = (now - started) / (counted - done) * (total - counted)
            told = f"{note}, " if note else ""
            note_line(f"{title}: {counted}/{total}, {told}{left_s / 60:.1f} min left")

        yield advance
        if total is not None and counted > done:  # short stages have no other line
            told = f"{noted}, " if noted else ""
            note_line(f"{title}: {counted}/{total}, {told}{self._clock() - started:.0f} s")


def shown_progress(*, quiet: bool) -> Progress:
    """Return bars on stderr, or nothing for `--quiet`."""
    return Silent() if quiet else RichProgress()


def write_text(path: Path, text: str) -> None:
    """Write a file the user asked for; RM303 if the folder is not there, not writable, or full."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise fail(
            "RM303", f"cannot write {path}: {error.strerror}", hint="Choose another --out."
        ) from error
