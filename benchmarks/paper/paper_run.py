"""Runs the cells of a grid: imports and builds what they need, then asks; goes on where it stopped.

Every command is a process of its own, so that what kills one leaves the others.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from paper_config import HUB, Cell, Grid
from paper_needs import data_file

from recmas_runtime.core.errors import Exit
from recmas_runtime.core.files import write_whole

STATE = "cell.json"

# Arguments of `recmasc` -> its exit status, and the object that `--json` prints; None for none.
Recmasc = Callable[[Sequence[str]], tuple[int, dict[str, Any] | None]]


@dataclass(frozen=True, kw_only=True)
class State:
    """How the last attempt at a cell ended.

    Attributes:
        status: `done`, `failed` or `interrupted`.
        command: The evaluation that was asked for.
        problems: What `recmasc` said; why it failed, or warnings.
    """

    status: str
    command: tuple[str, ...]
    problems: tuple[str, ...] = field(default=())
    seconds: float = 0.0


def folder_of(grid: Grid, cell: Cell) -> Path:
    """Return where a cell's answers are."""
    return grid.out / "cells" / cell.style.name / cell.benchmark


def state_of(grid: Grid, cell: Cell) -> State | None:
    """Return how the last attempt ended; None if there was none, or it was killed in its midst."""
    path = folder_of(grid, cell) / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return State(
        status=found["status"],
        command=tuple(found["command"]),
        problems=tuple(found["problems"]),
        seconds=found["seconds"],
    )


def is_done(grid: Grid, cell: Cell) -> bool:
    """Return whether a cell is whole, and was asked as it is now."""
    state = state_of(grid, cell)
    return state is not None and (state.status, state.command) == ("done", eval_command(grid, cell))


def run_cells(grid: Grid, cells: Sequence[Cell], recmasc: Recmasc) -> Iterator[tuple[Cell, State]]:
    """Run cells that are not done, a system at a time; yields each as it ends.

    A system that cannot be built fails its own cells and no others. Ends early when interrupted.
    """
    left = [cell for cell in cells if not is_done(grid, cell)]
    ordered = sorted(left, key=lambda cell: [one.bundle for one in left].index(cell.bundle))
    for _, group in groupby(ordered, key=lambda cell: cell.bundle):
        same = list(group)
        started = time.monotonic()
        status, problems = _build(grid, same[0], recmasc)
        built_s = time.monotonic() - started
        for cell in same:
            command = eval_command(grid, cell)
            if status == "done":
                state = _evaluate(grid, cell, command, recmasc)
            else:
                state = State(status=status, command=command, problems=problems, seconds=built_s)
            _write(grid, cell, state)
            yield cell, state
            if state.status == "interrupted":
                return


def build_commands(grid: Grid, cell: Cell) -> tuple[tuple[str, ...], ...]:
    """Return what makes the system of a cell: the import and the build."""
    config, settings = grid.config, grid.config.styles[cell.style.name]
    spec = _system(grid, cell) / "spec.yaml"
    origin = HUB if config.weights == HUB else config.weights
    overrides = [
        f"rounds={config.rounds}",
        f"latent_steps={config.latent_steps}",
        f"build.max_batch={config.batch}",
        f"build.max_prompt_tokens={settings.prompt_tokens or config.prompt_tokens}",
        f"answer.max_new_tokens={settings.answer_tokens or config.answer_tokens}",
        # As the released code asks; templates without the variable do not mind.
        *(f"agents.{a.role}.chat_template.enable_thinking=false" for a in cell.style.agents),
        *settings.set,
        *config.build_set,
    ]
    return (
        (
            *("import", "released", cell.style.name, "--from", origin),
            *("--task", cell.about.task, "--out", str(spec), "--force", "--json"),
        ),
        ("build", str(spec), "--out", str(_bundle(grid, cell)), *_sets(overrides), "--json"),
    )


def eval_command(grid: Grid, cell: Cell) -> tuple[str, ...]:
    """Return what asks the questions of a cell; finished answers are kept."""
    config = grid.config
    systems = (part for name in config.systems for part in ("--baseline", name))
    threads = () if config.threads is None else ("--threads", str(config.threads))
    return (
        *("eval", str(_bundle(grid, cell)), "--data", str(data_file(grid, cell))),
        *("--protocol", cell.about.protocol, *_sets(cell.overrides), *systems),
        *("--batch", str(config.batch), "--device", config.device, "--skip-broken"),
        *threads,
        *("--out", str(folder_of(grid, cell)), "--resume", "--json"),
    )


def _system(grid: Grid, cell: Cell) -> Path:
    return grid.out / "systems" / cell.bundle


def _bundle(grid: Grid, cell: Cell) -> Path:
    return _system(grid, cell) / "bundle"


def _sets(overrides: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for override in overrides for part in ("--set", override))


def _build(grid: Grid, cell: Cell, recmasc: Recmasc) -> tuple[str, tuple[str, ...]]:
    """Make a system; a build that is there and current is left as it is."""
    _system(grid, cell).mkdir(parents=True, exist_ok=True)
    for command in build_commands(grid, cell):
        code, said = recmasc(command)
        if code != Exit.OK:
            return _status(code), _reasons(command, code, said)
    return "done", ()


def _evaluate(grid: Grid, cell: Cell, command: tuple[str, ...], recmasc: Recmasc) -> State:
    folder_of(grid, cell).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    code, said = recmasc(command)
    status = "done" if code == Exit.OK else _status(code)
    return State(
        status=status,
        command=command,
        problems=_problems(said) if status == "done" else _reasons(command, code, said),
        seconds=time.monotonic() - started,
    )


def _status(code: int) -> str:
    return "interrupted" if code in (Exit.INTERRUPTED, -signal.SIGINT) else "failed"


def _reasons(command: Sequence[str], code: int, said: dict[str, Any] | None) -> tuple[str, ...]:
    if _status(code) == "interrupted":
        return ()
    return _problems(said) or (f"`recmasc {command[0]}` ended with status {code}",)


def _problems(said: dict[str, Any] | None) -> tuple[str, ...]:
    listed = [] if said is None else said["problems"]
    return tuple(f"{one['severity']}[{one['code']}]: {one['message']}" for one in listed)


def _write(grid: Grid, cell: Cell, state: State) -> None:
    path = folder_of(grid, cell) / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(asdict(state), indent=1) + "\n")


def recmasc_process(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """Run `recmasc` as a process; its progress goes to stderr, and Ctrl-C ends it in good order."""
    shown = [one for one in arguments if one != "--json"]
    print("$ recmasc", *shown, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "recmas_cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                printed, _ = process.communicate()
                break
            except KeyboardInterrupt:
                # It writes what it has and ends; a terminal has interrupted it, too.
                if not sys.stdin.isatty():
                    process.send_signal(signal.SIGINT)
    try:
        said = json.loads(printed)
    except ValueError:
        said = None
    return process.returncode, said
