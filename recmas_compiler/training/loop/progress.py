"""How far a stage has come, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from recmas_compiler.training.task import Watch

# Where nobody watches a bar, a line now and then shows that it is alive.
LINE_EVERY_S: Final = 30.0


@contextmanager
def watching(
    title: str,
    steps: int,
    *,
    quiet: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Watch]:
    """Give a function that shows steps and loss: a bar on a terminal, elsewhere some lines.

    Args:
        title: What runs.
        steps: All steps of the stage.
        quiet: Show nothing.
        clock: Seconds.
    """
    if quiet:
        yield lambda step, loss: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, steps, clock)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    shown = TextColumn("{task.fields[loss]}")
    with Bars(*columns, shown, TimeRemainingColumn(), console=console) as bars:
        task = bars.add_task(title, total=steps, loss="")
        yield lambda step, loss: bars.update(task, completed=step, loss=_loss_text(loss))


def _lines(title: str, steps: int, clock: Callable[[], float]) -> Watch:
    started = shown = clock()
    first_step = -1

    def watch(step: int, loss: float) -> None:
        nonlocal shown, first_step, started
        now = clock()
        if first_step < 0:
            first_step, started = step, now
            return
        if now - shown < LINE_EVERY_S:
            return
        shown = now
        left_s = (now - started) / (step - first_step) * (steps - step)
        line = f"{title}: {step}/{steps}, {_loss_text(loss)}, {left_s / 60:.1f} min left"
        print(line, file=sys.stderr, flush=True)

    return watch


def _loss_text(loss: float) -> str:
    return "" if loss != loss else f"loss {loss:.4f}"
