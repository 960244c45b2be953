"""A process that holds one engine and times it when asked: JSON lines in, JSON lines out.

Every engine has a process of its own, so that its memory is its own and no other engine's threads
wait beside it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from recmas_compiler.bench.engines.engine_adapters import Form, FormKey, open_form
from recmas_compiler.bench.engines.resident import peak_resident_bytes, restart_peak
from recmas_runtime.core.errors import RecmasError


def main() -> None:
    """Answer requests until the input ends."""
    with _answers() as answers:
        try:
            form = open_form(FormKey(**json.loads(sys.argv[1])))
        except RecmasError as error:
            _say(answers, {"problems": [problem.to_json() for problem in error.problems]})
            return
        _say(
            answers,
            {
                "precision": form.precision,
                "step_bytes": form.step_bytes,
                "can_step": form.can_step,
                "can_write": form.can_write,
            },
        )
        for line in sys.stdin:
            _say(answers, _visit(form, **json.loads(line)))


def _visit(form: Form, *, batch: int, capacity: int, used: int, steps: int) -> dict[str, Any]:
    """Time one prompt, latent steps behind it, and as many tokens."""
    restart_peak()
    form.prepare(batch, capacity, used)
    found: dict[str, float] = {"prefill_s": _seconds(form.prefill)}
    if form.can_step:
        before = form.inside_s()
        found["step_s"] = _seconds(lambda: form.step(steps)) / steps
        inside_s = form.inside_s() - before
        if not math.isnan(inside_s):
            found["outside_share"] = 1 - inside_s / (found["step_s"] * steps)
    if form.can_write:
        found["token_s"] = _seconds(lambda: form.write(steps)) / steps
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
    # Whoever asked may be gone before the answer; then there is nobody to tell.
    with contextlib.suppress(BrokenPipeError):
        main()
