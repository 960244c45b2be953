"""Commands in processes of their own: what each says, how long it takes, and its most memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from recmas_runtime.checking.machine import peak_resident_bytes_of
from recmas_runtime.core.errors import Exit, Problem, RecmasError, fail

_POLL_S: Final = 0.5
# The memory of a short command is seen only while it runs.
_FIRST_POLL_S: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A command that has ended.

    Attributes:
        data: What it found out.
        peak_memory_mb: Most resident memory that was seen, in MiB; None where nobody tells.
        interrupted: Whether it was, and has said what there is so far.
    """

    data: dict[str, Any]
    wall_s: float
    peak_memory_mb: float | None
    interrupted: bool


def run_alone(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    look: Callable[[], None] = lambda: None,
) -> Ran:
    """Run a module that prints one JSON object with `data` or `problems`, as commands do.

    Ctrl-C reaches it once, through this process, so that a training can end its step and save;
    the second one ends it at once.

    Args:
        log: Gets what it says on stderr, behind what is there.
        look: Is called now and then while it runs.

    Raises:
        RecmasError: Its problems; RM507 if it ended without a word.
        KeyboardInterrupt: It was interrupted here and had nothing to say.
    """
    command = [sys.executable, "-m", module, *arguments]
    began = time.perf_counter()
    peak: int | None = None
    wait_s = _FIRST_POLL_S
    asked_to_stop = False
    # A file and no pipe, which would fill up while nobody reads it.
    with log.open("ab") as told, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603  # our own modules
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=told,
            start_new_session=True,
        )
        with process:
            try:
                while process.poll() is None:
                    try:
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(wait_s)
                        wait_s = min(2 * wait_s, _POLL_S)
                        peak = _larger(peak, peak_resident_bytes_of(process.pid))
                        look()
                    except KeyboardInterrupt:
                        if asked_to_stop:
                            raise
                        asked_to_stop = True
                        process.send_signal(signal.SIGINT)
            except KeyboardInterrupt:
                process.kill()
                raise
        said.seek(0)
        printed = said.read()
    try:
        answer: dict[str, Any] = json.loads(printed)
    except ValueError:
        if asked_to_stop:
            raise KeyboardInterrupt from None
        raise fail(
            "RM507",
            f"the process of `{' '.join((module, *arguments[:2]))}` ended with status "
            f"{process.returncode}",
            hint=f"What it said is in {log}.",
        ) from None
    problems = [Problem(**found) for found in answer.get("problems") or ()]
    if any(p.severity == "error" for p in problems):
        raise RecmasError(problems)
    return Ran(
        data=answer.get("data") or {},
        wall_s=time.perf_counter() - began,
        peak_memory_mb=None if peak is None else peak / 2**20,
        interrupted=process.returncode == Exit.INTERRUPTED,
    )


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
