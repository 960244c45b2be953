"""Bubblewrap: namespaces, an almost empty file system, a seccomp filter and resource limits."""

from __future__ import annotations

import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final

from recmas_runtime.tools.sandbox.packages import (
    THREADS,
    Packages,
    installed_packages,
    names_of,
)
from recmas_runtime.tools.sandbox.program import (
    MAX_PROCESSES,
    MAX_TMP_BYTES,
    MAX_TMP_FILES,
    SandboxResult,
    run_python,
)
from recmas_runtime.tools.sandbox.seccomp import MACHINES, filter_program

_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_NOBODY: Final = 65534
# Numbers that no user, container or service has (systemd's table of user numbers, docs/UIDS-GIDS).
_UNUSED_USERS: Final = range(0x7000_0000, 0x7FFF_0000)

# Asks an interpreter where its standard library is and which shared libraries its own extension
# modules load. Windows, tests and examples are left out: tkinter alone would bring all of X11.
_PROBE: Final = """
import contextlib, importlib, json, pathlib, site, sysconfig
folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
for module in sorted(pathlib.Path(folders[1], "lib-dynload").glob("*.so")):
    name = module.name.partition(".")[0]
    if not name.startswith(("_tkinter", "_test", "_xx", "xx", "_ctypes_test")):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
mapped = sorted({line.split(maxsplit=5)[5] for line in maps if "/" in line and ".so" in line})
print(json.dumps([folders, mapped, site.getsitepackages()[0]]))
"""


@dataclass(frozen=True, kw_only=True)
class Bubblewrap:
    """Runs programs under bubblewrap."""

    executable: str
    name: str = "bubblewrap"

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float,
        memory_mb: int,
        packages: Sequence[str] = (),
    ) -> SandboxResult:
        """Run Python code (see `Sandbox.run`)."""
        interpreter = this_interpreter()
        shown = Packages()
        if packages:
            shown = installed_packages(tuple(packages), executable=interpreter.executable)
        with _filter_file() as filter_fd:
            return run_python(
                [
                    self.executable,
                    *_isolation(filter_fd),
                    *_file_system(interpreter, shown),
                    "--",
                    str(interpreter.executable),
                ],
                code,
                stdin=stdin,
                user=_unused_user(),
                timeout_s=timeout_s,
                memory_mb=memory_mb,
                max_processes=MAX_PROCESSES,
                env=THREADS if packages else {},
                pass_fds=(filter_fd,),
                watch=partial(_excess, max_bytes=memory_mb << 20),
            )

    def missing(self) -> str:
        """Return what bubblewrap lacks here, apart from its program; empty for nothing."""
        if Path("/proc/thread-self/children").exists():
            return ""
        return "this kernel does not list a process's children in /proc, so memory goes uncounted"


def _isolation(filter_fd: int) -> list[str]:
    """Return the options that cut a program off from everything that is no file."""
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    options += ["--unshare-cgroup-try", "--hostname", "sandbox", "--cap-drop", "ALL"]
    options += ["--die-with-parent", "--new-session", "--seccomp", str(filter_fd)]
    if os.getuid() == 0:
        # In a user namespace of root's the program would still be root to the kernel's limit on
        # processes, which does not bind root. So there is none, and the launcher gives root up.
        return [*options, "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    return [*options, "--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]


def _file_system(interpreter: Interpreter, packages: Packages) -> list[str]:
    """Return the options that build the file system: the interpreter, four devices, /tmp.

    There is no /proc and no /sys, and nothing but /tmp can be written to. Of the installed packages
    there are only the given ones.
    """
    folders = interpreter.folders
    libraries = {p for p in packages.libraries if not any(p.is_relative_to(f) for f in folders)}
    shown = (*folders, interpreter.executable, *sorted({*interpreter.libraries, *libraries}))
    options: list[str] = []
    # Left to itself, bubblewrap may make a folder on the way that only root can enter.
    for parent in sorted({parent for path in shown for parent in path.parents[:-1]}):
        options += ["--perms", "0755", "--dir", str(parent)]
    for path in shown:
        options += ["--ro-bind", str(path), str(path)]
    for folder in interpreter.hidden:
        options += ["--tmpfs", str(folder)]
    for name, path in packages.entries:
        options += ["--ro-bind", str(path), str(interpreter.site / name)]
    for folder in interpreter.hidden:
        options += ["--remount-ro", str(folder)]
    for device in _DEVICES:
        options += ["--dev-bind", device, device]
    options += ["--perms", "1777", "--size", str(MAX_TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]  # noqa: S108


@contextmanager
def _filter_file() -> Iterator[int]:
    """Open the seccomp filter for reading, without a file on disk."""
    fd = os.memfd_create("seccomp")
    try:
        os.write(fd, filter_program(MACHINES[platform.machine()]))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _unused_user() -> int:
    """Return the number of a user that owns nothing, another one for each run where that goes.

    The kernel counts a user's processes; runs that shared one would share its limit.
    """
    rows = (line.split() for line in Path("/proc/self/uid_map").read_text().splitlines())
    has_all = any(int(first) + int(count) >= _UNUSED_USERS.stop for first, _, count in rows)
    return secrets.choice(_UNUSED_USERS) if has_all else _NOBODY


@dataclass(frozen=True)
class Interpreter:
    """An interpreter's files; every path is absolute.

    Attributes:
        hidden: Folders of installed packages inside `folders`.
        libraries: The dynamic loader and the shared libraries, under every name they go by.
        site: Where it looks for installed packages.
    """

    executable: Path
    folders: tuple[Path, ...]
    hidden: tuple[Path, ...]
    libraries: tuple[Path, ...]
    site: Path


@cache
def this_interpreter() -> Interpreter:
    """Find out the files of the interpreter that runs recmas.

    Raises:
        OSError: The interpreter cannot be started.
        subprocess.SubprocessError: It fails or takes more than a minute.
    """
    # Outside of a virtual environment, which holds a link and no library.
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    # -S: without site, so that no installed package's start-up code runs.
    ran = subprocess.run(  # noqa: S603 - our own interpreter and program
        [str(executable), "-I", "-S", "-c", _PROBE],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={},
    )
    folders, mapped, site = json.loads(ran.stdout)
    stdlib = tuple(dict.fromkeys(Path(folder) for folder in folders))
    libraries = {
        name
        for library in map(Path, mapped)
        if not any(library.is_relative_to(folder) for folder in stdlib)
        for name in names_of(library)
    }
    packages = (folder / name for folder in stdlib for name in ("site-packages", "dist-packages"))
    return Interpreter(
        executable=executable,
        folders=stdlib,
        hidden=tuple(folder for folder in packages if folder.is_dir()),
        libraries=tuple(sorted(libraries | set(Path("/").glob("lib*/ld-*.so.*")))),
        site=Path(site),
    )


def _excess(pid: int, *, max_bytes: int) -> str:
    """Return why the processes below `pid` must be stopped; empty if they need not be.

    Limits count each process alone; this reads what all hold together, from outside.
    """
    members = tuple(_descendants(pid))
    # Resident sizes are quick to read but count what forks share once for each; proportional ones
    # are right but slow.
    if all(
        sum(map(bytes_of, members)) > max_bytes
        for bytes_of in (_resident_bytes, _proportional_bytes)
    ):
        return f"stopped: its processes together use more than {max_bytes >> 20} MiB"
    if members and _files_in_tmp(members[-1]) > MAX_TMP_FILES:
        return f"stopped: it made more than {MAX_TMP_FILES} files"
    return ""


def _descendants(pid: int) -> Iterator[int]:
    children: list[int] = []
    with suppress(OSError):  # It has ended meanwhile.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text(encoding="ascii").split())
    for child in children:
        yield child
        yield from _descendants(child)


def _resident_bytes(pid: int) -> int:
    """Return the anonymous and shared memory of a process; 0 once it has ended."""
    try:
        return _sum_bytes(Path(f"/proc/{pid}/status"), "RssAnon:", "RssShmem:")
    except OSError:
        return 0


def _proportional_bytes(pid: int) -> int:
    """Return the same with each page divided by the number of processes that share it."""
    try:
        shared = _sum_bytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:", "Pss_Shmem:")
    except PermissionError:
        return _resident_bytes(pid)
    except OSError:
        return 0
    return shared or _resident_bytes(pid)  # older kernels do not say


def _sum_bytes(table: Path, *keys: str) -> int:
    lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(keys))


def _files_in_tmp(pid: int) -> int:
    """Return how many files the sandbox's /tmp holds; 0 where the kernel does not say."""
    try:
        found = os.statvfs(f"/proc/{pid}/root/tmp")
    except OSError:
        return 0
    # While a sandbox is being set up, the path may still lead to the machine's own /tmp.
    is_ours = found.f_blocks * found.f_frsize == MAX_TMP_BYTES
    return found.f_files - found.f_ffree if is_ours else 0
