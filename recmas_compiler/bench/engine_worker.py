"""A process that holds one engine and times it when asked: JSON lines in, JSON lines out."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

from recmas_compiler.bench.engine_adapters import EngineAdapter, EngineKey, open_engine
from recmas_runtime.core.errors import RecmasError

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")
_PEAK: Final = "5"


def restart_peak() -> None:
    """Forget the peak so far, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        _RESET.write_text(_PEAK)


def peak_resident_bytes() -> int:
    """Return the most resident memory since `restart_peak`, or since the start of the process."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def main() -> None:
    """Answer requests until the input ends."""
    with _answers() as answers:
        try:
            engine = open_engine(EngineKey(**json.loads(sys.argv[1])))
        except RecmasError as error:
            _say(answers, {"problems": [problem.to_json() for problem in error.problems]})
            return
        _say(
            answers,
            {
                "precision": engine.precision,
                "step_bytes": engine.step_bytes,
                "can_step": engine.can_step,
                "can_write": engine.can_write,
            },
        )
        for line in sys.stdin:
            _say(answers, _visit(engine, **json.loads(line)))


def _visit(
    engine: EngineAdapter, *, batch: int, capacity: int, used: int, steps: int
) -> dict[str, Any]:
    """Time one prompt, latent steps behind it, and as many tokens."""
    restart_peak()
    engine.prepare(batch, capacity, used)
    found: dict[str, float] = {"prefill_s": _seconds(engine.prefill)}
    if engine.can_step:
        before = engine.inside_s()
        found["step_s"] = _seconds(lambda: engine.step(steps)) / steps
        after = engine.inside_s()
        if before is not None and after is not None:
            found["outside_share"] = 1 - (after - before) / (found["step_s"] * steps)
    if engine.can_write:
        found["token_s"] = _seconds(lambda: engine.write(steps)) / steps
    return {**found, "memory_bytes": peak_resident_bytes()}


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _answers() -> TextIO:
    """Return the real stdout, and let everything that libraries print go to stderr instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _say(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    # The parent may have ended before the answer.
    with contextlib.suppress(BrokenPipeError):
        main()
