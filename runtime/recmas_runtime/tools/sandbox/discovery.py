"""Find a sandbox that works here. One that has not passed its trial is not used."""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from recmas_runtime.tools.sandbox.bubblewrap import Bubblewrap, this_interpreter
from recmas_runtime.tools.sandbox.container import DEFAULT_IMAGE, IMAGE_VARIABLE, Container
from recmas_runtime.tools.sandbox.program import Sandbox
from recmas_runtime.tools.sandbox.seccomp import MACHINES

_TRIAL_TIMEOUT_S: Final = 30.0
_TRIAL_MEMORY_MB: Final = 256


@dataclass(frozen=True)
class Survey:
    """Which sandbox to use, if any, and for each other backend why it is not used."""

    sandbox: Sandbox | None
    reasons: Mapping[str, str]


def find_sandbox() -> Sandbox | None:
    """Return a sandbox that passed its trial on this machine, or None: then nothing may run."""
    return survey_sandboxes().sandbox


def survey_sandboxes() -> Survey:
    """Try the backends in turn, cheapest first, until one passes its trial.

    Remembered for as long as PATH and the image that the environment names stay the same.
    """
    path = os.environ.get("PATH", "")
    return _survey(path, os.environ.get(IMAGE_VARIABLE, DEFAULT_IMAGE))


@cache
def _survey(path: str, image: str) -> Survey:
    found: Sandbox | None = None
    reasons: dict[str, str] = {}
    for backend, program in (("bubblewrap", "bwrap"), ("docker", "docker"), ("podman", "podman")):
        executable = shutil.which(program, path=path)
        if found is not None:
            reasons[backend] = f"not tried, {found.name} works"
        elif executable is None:
            reasons[backend] = f"`{program}` is not installed"
        elif platform.machine() not in MACHINES:
            only = ", ".join(MACHINES)
            reasons[backend] = f"no seccomp filter for {platform.machine()}, only for {only}"
        else:
            sandbox = (
                Bubblewrap(executable=executable)
                if backend == "bubblewrap"
                else Container(name=backend, executable=executable, image=image)
            )
            reasons[backend] = sandbox.missing() or failing(sandbox)
            found = None if reasons[backend] else sandbox
    return Survey(found, reasons)


def failing(sandbox: Sandbox) -> str:
    """Try a sandbox out and return why it must not be used; empty if it may.

    1. A harmless program must give the expected output.
    2. A program that tries to reach a server on this machine, a file of it, the home folder, root,
       and places to write to must reach none of them.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix="recmas-trial-") as folder,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            return _harmless(sandbox) or _way_out(sandbox, Path(folder), server)
    except (OSError, subprocess.SubprocessError) as error:
        return f"its trial failed: {error}"


def _harmless(sandbox: Sandbox) -> str:
    ran = sandbox.run(
        _HARMLESS, stdin="1\n", timeout_s=_TRIAL_TIMEOUT_S, memory_mb=_TRIAL_MEMORY_MB
    )
    if ran.status == "ok" and ran.stdout == "2432902008176640001\n":
        return ""
    said = ran.stderr_tail.strip().splitlines() or [f"{ran.status}, printed {ran.stdout!r}"]
    return f"a harmless program does not run in it: {said[-1]}"


def _way_out(sandbox: Sandbox, folder: Path, server: socket.socket) -> str:
    secret = folder / "secret"
    secret.write_text("secret", encoding="ascii")
    folder.chmod(0o777)  # so that only the sandbox keeps a program out
    home = Path(os.environ.get("HOME", "/"))
    # A sandbox may show files of its own under these names; whether it wrote to ours is seen here.
    written = [
        place / f"recmas-trial-{secrets.token_hex(8)}"
        for place in (folder, home, Path.cwd(), Path("/"), Path("/etc"))
    ]
    settings = {
        "port": server.getsockname()[1],
        "secret": str(secret),
        "home": str(home),
        "names": sorted(_names(home)) if home != Path("/") else [],
        "written": [str(path) for path in written],
    }
    ran = sandbox.run(
        _PROBE, stdin=json.dumps(settings), timeout_s=_TRIAL_TIMEOUT_S, memory_mb=_TRIAL_MEMORY_MB
    )
    open_doors = [f"writing to {path.parent}" for path in written if path.exists()]
    for path in written:
        path.unlink(missing_ok=True)
    if ran.status != "ok":
        said = ran.stderr_tail.strip().splitlines() or [ran.status]
        return f"its doors could not be tried: {said[-1]}"
    open_doors += ran.stdout.splitlines()
    return f"it does not hold: {', '.join(open_doors)}" if open_doors else ""


def _names(folder: Path) -> set[str]:
    """Return what is in a folder, as far as the interpreter's own files do not pass through it."""
    own = this_interpreter()
    paths = (*own.folders, own.executable, *own.libraries)
    passed = {p.relative_to(folder).parts[0] for p in paths if p.is_relative_to(folder)}
    try:
        return {path.name for path in folder.iterdir()} - passed
    except OSError:
        return set()


# A thread, because C libraries start them in different ways and the filter must allow this one's.
_HARMLESS: Final = """
import ctypes, hashlib, math, threading
numbers = [int(input())]
thread = threading.Thread(target=lambda: numbers.append(math.factorial(20)))
thread.start()
thread.join()
print(sum(numbers))
"""

# Prints what it could reach, one to a line.
_PROBE: Final = """
import contextlib, json, os, socket, sys
given = json.load(sys.stdin)

def attempt(door, action):
    with contextlib.suppress(Exception):
        if action():
            print(door)

def connect():
    return socket.create_connection(("127.0.0.1", given["port"]), timeout=2)

attempt("network", connect)
attempt("a file of the host", lambda: open(given["secret"]).read())
attempt("the home folder", lambda: set(os.listdir(given["home"])) & set(given["names"]))
attempt("being root", lambda: os.getuid() == 0)
attempt("becoming root", lambda: os.setuid(0) is None)
for path in given["written"]:
    attempt(None, lambda: open(path, "w").close())
"""
