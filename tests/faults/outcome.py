"""One command in a process of its own, and what its end must look like whatever it was given.

A case forks this process instead of starting Python: what is imported here need not be imported
again, and what a case breaks is broken in the child alone.

Environment:
    RECMAS_FAULTS_LIMIT_S: Seconds that a command may take, on a machine that is not quiet.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import pty
import resource
import selectors
import signal
import sys
import tempfile
import threading
import time
import traceback
import tty
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from recmas_runtime.core.errors import CODES, Exit

# Many times what a case needs on a quiet machine.
LIMIT_S: Final = float(os.environ.get("RECMAS_FAULTS_LIMIT_S", "60"))
# Far above what a case needs, far below what would take this machine down.
MEMORY_BYTES: Final = 12 * 2**30
_END_WITH_PARENT: Final = 1  # PR_SET_PDEATHSIG
STATUSES: Final = frozenset(int(status) for status in Exit)
# What a program of recmas never prints, whatever it was given.
NEVER: Final = (
    "Traceback (most recent call last)",
    "internal error",
    "This is a bug in recmas",
    "panicked at",
    "Exception ignored in",
    "Fatal Python error",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a process ended and what it printed.

    Attributes:
        status: Negative for a signal, None where it did not end in time.
        on_terminal: Whether both streams were one pseudo-terminal; `stdout` holds both then.
    """

    status: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    on_terminal: bool = False

    @property
    def text(self) -> str:
        """Everything that was printed."""
        return (self.stdout + self.stderr).decode("utf-8", errors="backslashreplace")

    def json(self) -> dict[str, Any]:
        """Return what `--json` printed."""
        body: dict[str, Any] = json.loads(self.stdout)
        return body


def judge(outcome: Outcome, *, data_on_stdout: bool = False, natively: bool = False) -> list[str]:
    """Return what is wrong about an end, in words; nothing for a clean answer or refusal.

    Args:
        data_on_stdout: Answers or JSON go there: data, which a pipe gets as it is.
        natively: Files that native libraries read were changed at random: a crash inside of these
            is theirs, and no Python code can catch it.
    """
    status = outcome.status
    if status is None:
        return [f"did not end within {outcome.seconds:.0f} s"]
    if status < 0:
        name = signal.Signals(-status).name
        crashed = natively and name in ("SIGSEGV", "SIGABRT", "SIGFPE", "SIGBUS", "SIGILL")
        return [] if crashed else [f"ended by {name}"]
    faults = [f"prints {words!r}" for words in NEVER if words in outcome.text]
    if status not in STATUSES:
        faults.append(f"ends with status {status}")
    streams = [outcome.stderr]
    if outcome.on_terminal or not data_on_stdout:
        streams.append(outcome.stdout)
    for stream in streams:
        faults += _escapes(stream)
    codes = codes_in(outcome)
    known = {CODES[code][0] for code in codes if code in CODES}
    if status not in (Exit.OK, Exit.INTERRUPTED) and status not in known:
        faults.append(f"ends with status {status} and without a code that says so")
    if status == Exit.OK and not faults and any(code in _STOPPING for code in codes):
        faults.append(f"ends with status 0 after {', '.join(codes)}")
    return faults


_STOPPING: Final = frozenset(code for code, (status, _) in CODES.items() if status != Exit.OK)


def codes_in(outcome: Outcome) -> list[str]:
    """Return the codes of the errors that were printed, as lines or as JSON."""
    try:
        problems = json.loads(outcome.stdout)["problems"]
        return [p["code"] for p in problems if p["severity"] == "error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pieces = outcome.text.split("error[RM")[1:]
        return [f"RM{piece[:3]}" for piece in pieces]


def warnings_in(outcome: Outcome) -> list[str]:
    """Return the codes of the warnings that were printed."""
    try:
        problems = json.loads(outcome.stdout)["problems"]
        return [p["code"] for p in problems if p["severity"] == "warning"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return [f"RM{piece[:3]}" for piece in outcome.text.split("warning[RM")[1:]]


def _escapes(stream: bytes) -> list[str]:
    text = stream.decode("utf-8", errors="replace")
    # What is no letter and no sign, but line ends, tabs and the joiners that scripts need.
    raw = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
    raw -= set("\n\r\t\u200c\u200d")
    return [f"prints the control characters {sorted(raw)!r} as they are"] if raw else []


def forked(
    action: Callable[[], object],
    *,
    limit_s: float = LIMIT_S,
    stdin: bytes = b"",
    on_terminal: bool = False,
    kill_after_s: float | None = None,
    kill_by: int = signal.SIGKILL,
    limits: Sequence[tuple[int, int]] = (),
) -> Outcome:
    """Run `action` in a child as a command runs: standard streams, an exit status.

    Args:
        limit_s: The child is killed after that.
        kill_after_s: Send `kill_by` then, if the child still runs.
        limits: Resources of `setrlimit` and how much of each the child may have.
    """
    begun = time.monotonic()
    given = tempfile.TemporaryFile()  # noqa: SIM115
    given.write(stdin)
    given.seek(0)
    if on_terminal:
        reading_out, writing_out = pty.openpty()
        tty.setraw(writing_out)
        reading_err, writing_err = os.pipe()
        os.close(writing_err)
        writing_err = os.dup(writing_out)
    else:
        reading_out, writing_out = os.pipe()
        reading_err, writing_err = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        for place, stream in enumerate((given.fileno(), writing_out, writing_err)):
            os.dup2(stream, place)
        for stream in (reading_out, reading_err, writing_out, writing_err):
            os.close(stream)
        _as_program(action, limits)
    given.close()
    os.close(writing_out)
    os.close(writing_err)
    printed: dict[int, bytearray] = {reading_out: bytearray(), reading_err: bytearray()}
    end = begun + limit_s
    kill_at = None if kill_after_s is None else begun + kill_after_s
    handle = os.pidfd_open(child)
    late = False
    with selectors.DefaultSelector() as wanted:
        for stream in (*printed, handle):
            wanted.register(stream, selectors.EVENT_READ)
        running = True
        while running:
            now = time.monotonic()
            if kill_at is not None and now >= kill_at:
                os.kill(child, kill_by)
                kill_at = None
            if now >= end:
                late = True
                os.killpg(child, signal.SIGKILL)
                break
            until = end if kill_at is None else min(end, kill_at)
            for key, _ in wanted.select(max(0.0, until - now)):
                if key.fd == handle:
                    running = False
                elif not _read(key.fd, printed[key.fd]):
                    wanted.unregister(key.fd)
    _, status = os.waitpid(child, 0)
    for stream, found in printed.items():
        os.set_blocking(stream, False)
        while _read(stream, found):
            pass
        os.close(stream)
    os.close(handle)
    # what it may have left running
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return Outcome(
        status=None if late else os.waitstatus_to_exitcode(status),
        stdout=bytes(printed[reading_out]),
        stderr=bytes(printed[reading_err]),
        seconds=time.monotonic() - begun,
        on_terminal=on_terminal,
    )


def _read(stream: int, found: bytearray) -> bool:
    """Read what is there; False at the end of the stream."""
    try:
        piece = os.read(stream, 65536)
    except OSError:  # EIO is how a pseudo-terminal ends, EAGAIN that nothing is there now
        return False
    found += piece
    return bool(piece)


def _as_program(action: Callable[[], object], limits: Sequence[tuple[int, int]]) -> NoReturn:
    """Do in a fresh child what Python does around a program, and end it."""
    status = 1
    try:
        faulthandler.disable()
        # ends with the process that waits for it, should that be ended
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = _stream(1, "strict", line_buffering=os.isatty(1))
        sys.stderr = _stream(2, "backslashreplace", line_buffering=True)
        # pytest keeps these for itself
        sys.unraisablehook = sys.__unraisablehook__
        threading.excepthook = threading.__excepthook__
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for kind, amount in ((resource.RLIMIT_AS, MEMORY_BYTES), *limits):
            resource.setrlimit(kind, (amount, amount))
        status = _status_of(action)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            if not sys.stdout.closed:
                os.write(2, f"Exception ignored in stdout: {error!r}\n".encode())
                status = 120
        finally:
            os._exit(status)


def _stream(number: int, errors: str, *, line_buffering: bool) -> io.TextIOWrapper:
    raw = io.FileIO(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors=errors, line_buffering=line_buffering
    )


def _status_of(action: Callable[[], object]) -> int:
    try:
        returned = action()
    except SystemExit as ended:
        returned = ended.code
    if returned is None:
        return 0
    return returned if isinstance(returned, int) else 1
