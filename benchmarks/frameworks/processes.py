"""Programs of the race: started, measured from /proc, and ended with all that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
READY_S = 300.0


@contextmanager
def running(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str], pipes: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a group of its own until the block ends; its words go into a file."""
    pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
    with log.open("a", encoding="utf-8") as words:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=subprocess.PIPE if pipes else words,
            stderr=words,
            env=dict(environment),
            text=True,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for stop, wait_s in ((signal.SIGTERM, 40.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, stop)
        except ProcessLookupError:
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
        break
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def family(pid: int) -> list[int]:
    """Return a process and all below it that are still there."""
    found, left = [], [pid]
    while left:
        one = left.pop()
        found.append(one)
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                left += map(int, children.read_text(encoding="ascii").split())
            except OSError:
                continue  # a thread that has ended
    return found


def processor_s(pid: int) -> float:
    """Return the processor seconds of a process and of all below it up to now."""
    ticks = 0
    for one in family(pid):
        try:
            # What is behind the name, which may hold spaces: utime and stime are fields 14 and 15.
            fields = (
                Path(f"/proc/{one}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            )
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def peak_kib(pid: int) -> int:
    """Return the sum of the peak resident memory of a process and of all below it."""
    total = 0
    for one in family(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text(encoding="utf-8")
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
    return total


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until_up(url: str, process: subprocess.Popen[str], log: Path) -> None:
    """Return once `url` answers with 200."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{process.args} ended with {process.returncode}; see {log}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise SystemExit(f"{process.args} was not ready within {READY_S:.0f} s; see {log}")
