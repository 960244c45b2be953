"""Processes that hold one engine each, and the questions put to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

from recmas_compiler.bench.engines.engine_adapters import FormKey
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.progress import Progress

_MODULE: Final = "recmas_compiler.bench.engines.engine_worker"
_SECONDS_TO_END: Final = 5.0


class Worker:
    """One engine in a process of its own.

    Args:
        key: What it opens.

    Attributes:
        key: What it opened.
        about: What it says of itself: precision, bytes that a step reads, what it can do.

    Raises:
        RecmasError: What opening the engine raised; RM507 if the process died.
    """

    def __init__(self, key: FormKey) -> None:
        self.key = key
        # A session of its own: Ctrl-C is for the process that asks, which ends this one.
        self._process = subprocess.Popen(  # noqa: S603  # our own module, our own arguments
            [sys.executable, "-m", _MODULE, json.dumps(asdict(key))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.about: Mapping[str, Any] = {}

    def wait_until_open(self) -> None:
        """Return once the engine is open."""
        self.about = self._reply()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Put a request and return the reply."""
        assert self._process.stdin is not None, "stdin is a pipe"
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None, "stdin is a pipe"
        assert self._process.stdout is not None, "stdout is a pipe"
        self._process.terminate()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "stdout is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise fail(
                "RM507",
                f"the process of engine {self.key.engine!r} ended with status "
                f"{self._process.wait()}",
                hint="What it printed on stderr says why; leave it out with --engine otherwise.",
            )
        reply: dict[str, Any] = json.loads(line)
        if "problems" in reply:
            raise RecmasError(Problem(**problem) for problem in reply["problems"])
        return reply


@contextmanager
def running(keys: Sequence[FormKey], progress: Progress) -> Iterator[list[Worker]]:
    """Run a worker for each key until the context is left.

    They open one after the other: opening side by side takes as long, and peaks in memory.
    """
    workers: list[Worker] = []
    try:
        with progress.stage("Opening engines", len(keys)) as advance:
            for key in keys:
                workers.append(Worker(key))
                workers[-1].wait_until_open()
                advance()
        yield workers
    finally:
        for worker in workers:
            worker.close()
