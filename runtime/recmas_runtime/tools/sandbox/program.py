"""A program in a sandbox, whatever the backend: its bounds, its start, its result."""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Final, Literal, Protocol

# Bounds that no caller needs to choose; with `memory_mb` they are all that a program can use up.
MAX_OUTPUT_BYTES: Final = 1 << 20
MAX_PROCESSES: Final = 64
MAX_OPEN_FILES: Final = 128
MAX_FILE_BYTES: Final = 16 << 20
MAX_TMP_BYTES: Final = 32 << 20
MAX_TMP_FILES: Final = 4096
STDERR_TAIL_CHARS: Final = 4000

# Passed as text: a file would have to be put into the sandbox first.
_LAUNCHER: Final = Path(__file__).with_name("launcher.py")

_READ_BYTES: Final = 1 << 16
_WATCH_EVERY_S: Final = 0.02
# After its process has ended, how long output that is under way may take to arrive.
_DRAIN_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """What a program did.

    Attributes:
        status: `ok` for exit code 0, `timeout` if it was stopped for its time.
        stdout: What it wrote, at most 1 MiB with stderr; bytes that are no UTF-8 replaced.
        stderr_tail: The last 4000 characters of its standard error, and why it was stopped if it
            used more memory or wrote more than it may.
    """

    status: Literal["ok", "error", "timeout"]
    stdout: str
    stderr_tail: str
    exit_code: int | None
    ms: float


class Sandbox(Protocol):
    """A place where a program can harm nothing outside of it."""

    @property
    def name(self) -> str:
        """The backend, as `recmas doctor` calls it."""

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float,
        memory_mb: int,
        packages: Sequence[str] = (),
    ) -> SandboxResult:
        """Run Python code; what it does wrong is in the result. Safe to call from many threads.

        Args:
            code: The program. It has the standard library, 32 MiB in /tmp, and nothing else.
            timeout_s: Wall-clock seconds, start of the sandbox included.
            memory_mb: MiB of all its processes together.
            packages: Installed packages, by the names they are imported by, that it may import
                too; it cannot write to them. Those that are not installed are not there.
        """


def run_python(
    command: Sequence[str],
    code: str,
    *,
    stdin: str,
    user: int,
    timeout_s: float,
    memory_mb: int,
    max_processes: int | None,
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    watch: Callable[[int], str] | None = None,
    stop: Callable[[], None] | None = None,
) -> SandboxResult:
    """Run code in a sandbox, in a session of its own, and never leave it running.

    Args:
        command: Starts an interpreter inside the sandbox; it is not looked up in PATH.
        user: Number of the user that a sandbox entered as root goes on as.
        memory_mb: MiB of each process.
        max_processes: Of the user; None for as many as there may be.
        watch: Is given the process id at least every 20 ms; a reason that it returns stops the
            program.
        stop: Is called after the process was killed, for what a kill does not reach.

    Raises:
        OSError: The command cannot be started.
    """
    limits = {  # of every process, by their names in `resource`
        "RLIMIT_AS": memory_mb << 20,
        "RLIMIT_CPU": math.ceil(timeout_s) + 1,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_SIGPENDING": MAX_PROCESSES,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    if max_processes is not None:
        limits["RLIMIT_NPROC"] = max_processes
    # Lone surrogates, which UTF-8 has not, become `?`.
    program, given = (text.encode("utf-8", "replace") for text in (code, stdin))
    settings = {"code_bytes": len(program), "user": user, "limits": limits}
    launcher = _LAUNCHER.read_text(encoding="ascii")
    start = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 - the sandbox
        [*command, "-I", "-S", "-B", "-c", launcher, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        pass_fds=pass_fds,
        start_new_session=True,
    ) as process:
        exchange = _Exchange(process, program + given)
        try:
            ended, why = _follow(process, exchange, start + timeout_s, watch)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):  # the sandbox's own rules end what is inside
                    os.killpg(process.pid, signal.SIGKILL)
                if stop is not None:
                    stop()
            exchange.close()
        returned = process.wait()
    stderr = exchange.stderr.decode("utf-8", "replace")
    if why:
        stderr += f"\n{why}"
    exit_code = returned if ended == "itself" else None
    return SandboxResult(
        status="timeout" if ended == "time" else "ok" if exit_code == 0 else "error",
        stdout=exchange.stdout.decode("utf-8", "replace"),
        stderr_tail=stderr[-STDERR_TAIL_CHARS:],
        exit_code=exit_code,
        ms=(time.perf_counter() - start) * 1e3,
    )


def _follow(
    process: subprocess.Popen[bytes],
    exchange: _Exchange,
    deadline: float,
    watch: Callable[[int], str] | None,
) -> tuple[Literal["itself", "time", "bound"], str]:
    """Exchange input and output until the program has ended or must be stopped, and say why."""
    drain_until = None
    while True:
        now = time.perf_counter()
        if exchange.is_full:
            return "bound", f"stopped: it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB"
        if process.poll() is None:
            if now >= deadline:
                return "time", ""
            if watch is not None and (why := watch(process.pid)):
                return "bound", why
        else:
            drain_until = drain_until or now + _DRAIN_S
            if exchange.is_over or now >= drain_until:
                return "itself", ""
        exchange.step(min(_WATCH_EVERY_S, max(0.0, deadline - now)))


class _Exchange:
    """The three pipes of a process; nothing of it blocks longer than it is told to."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: bytes) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.stdout, self.stderr = bytearray(), bytearray()
        self._left = memoryview(stdin)
        self._room = MAX_OUTPUT_BYTES
        self._selector = selectors.DefaultSelector()
        self._pipes: list[IO[bytes]] = [process.stdin, process.stdout, process.stderr]
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(process.stdin, selectors.EVENT_WRITE, self._write)
        for pipe, into in ((process.stdout, self.stdout), (process.stderr, self.stderr)):
            self._selector.register(pipe, selectors.EVENT_READ, partial(self._read, pipe, into))
        self._stdin = process.stdin

    @property
    def is_full(self) -> bool:
        """Whether the program has written more than it may."""
        return self._room < 0

    @property
    def is_over(self) -> bool:
        """Whether both outputs have ended."""
        return all(pipe.closed for pipe in self._pipes[1:])

    def step(self, seconds: float) -> None:
        """Move what is ready, or wait so long for something to become so."""
        if not self._selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in self._selector.select(seconds):
            key.data()

    def close(self) -> None:
        """Give the pipes back."""
        for pipe in self._pipes:
            # Closing flushes, and the reader may be gone.
            with suppress(OSError):
                pipe.close()
        self._selector.close()

    def _write(self) -> None:
        try:
            written = os.write(self._stdin.fileno(), self._left[:_READ_BYTES])
        except BlockingIOError:
            return
        except OSError:  # The program does not read its input, which is its right.
            written = len(self._left)
        self._left = self._left[written:]
        if not self._left:
            self._end(self._stdin)

    def _read(self, pipe: IO[bytes], into: bytearray) -> None:
        try:
            piece = os.read(pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not piece:
            self._end(pipe)
            return
        into += piece[: max(0, self._room)]
        self._room -= len(piece)

    def _end(self, pipe: IO[bytes]) -> None:
        self._selector.unregister(pipe)
        with suppress(OSError):
            pipe.close()
