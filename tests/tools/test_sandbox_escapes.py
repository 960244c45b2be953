"""Hostile programs. Each tries one way out of the sandbox or one way to do harm; none may succeed.

Where it can be told from outside, the evidence is the host's: no connection arrived, the file is as
it was, the victim lives. The attacks that are harmless to this machine also run without a sandbox,
and succeed there: an attack that cannot work proves nothing.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recmas_runtime.tools.sandbox import Sandbox, SandboxResult, find_sandbox, survey_sandboxes
from recmas_runtime.tools.sandbox.program import (
    MAX_FILE_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_PROCESSES,
    MAX_TMP_BYTES,
    MAX_TMP_FILES,
)
from recmas_runtime.tools.sandbox.seccomp import MACHINES, NEWEST
from refused_calls import REFUSED

pytestmark = pytest.mark.skipif(
    find_sandbox() is None, reason=f"no sandbox here: {dict(survey_sandboxes().reasons)}"
)
REPOSITORY = Path(__file__).parents[2]
COLUMN = 1 if platform.machine() == "aarch64" else 0  # of `REFUSED`

# A container of an image has some more files, ends itself what uses too much, and starts slowly.
IS_BUBBLEWRAP = getattr(find_sandbox(), "name", None) == "bubblewrap"
STOP_AFTER_S = 2 if IS_BUBBLEWRAP else 8

PRELUDE = """
import ctypes, errno, mmap, os, resource, signal, socket, stat, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


OS_ERRORS = ("PermissionError", "FileNotFoundError", "OSError", "ProcessLookupError")
FORBIDDEN = ("PermissionError",)


def sandbox() -> Sandbox:
    found = find_sandbox()
    assert found is not None
    return found


def run(code: str, *, timeout_s: float = 20, memory_mb: int = 256) -> SandboxResult:
    return sandbox().run(PRELUDE + textwrap.dedent(code), timeout_s=timeout_s, memory_mb=memory_mb)


def attempt(attack: str) -> str:
    """Return a program that prints ESCAPED, or the name of the error that stopped the attack."""
    return (
        "try:\n"
        + textwrap.indent(textwrap.dedent(attack).strip(), "    ")
        + "\n    print('ESCAPED')\n"
        + "except Exception as error:\n    print(type(error).__name__, error)\n"
    )


def assert_held(*attacks: str, errors: tuple[str, ...] = OS_ERRORS) -> None:
    """Try the attacks one after the other, in one program: each must fail with one of `errors`."""
    result = run("".join(map(attempt, attacks)))
    assert result.status == "ok", result
    outcomes = result.stdout.splitlines()
    assert len(outcomes) == len(attacks), outcomes
    for attack, outcome in zip(attacks, outcomes, strict=True):
        assert outcome.split()[0] in errors, (attack, outcome)


def assert_works_outside(attack: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PRELUDE + attempt(attack)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert ran.stdout == "ESCAPED\n", ran.stdout


# The network


def test_tcp_to_the_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        attack = f"socket.create_connection(('127.0.0.1', {port}), timeout=3)"
        assert_held(attack, errors=(*OS_ERRORS, "ConnectionRefusedError"))
        with pytest.raises(BlockingIOError):
            server.accept()
        assert_works_outside(attack)
        server.accept()


def test_udp_to_the_host() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        to = server.getsockname()
        attack = f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', {to!r})"
        result = run(attempt(attack))
        assert result.status == "ok"
        with pytest.raises(BlockingIOError):
            server.recv(1)
        assert_works_outside(attack)
        assert server.recv(1) == b"x"


def test_dns() -> None:
    assert_held("socket.getaddrinfo('example.com', 80)", errors=("gaierror", *OS_ERRORS))
    assert_held(
        "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n"
        "    s.connect(('8.8.8.8', 53))\n    s.send(b'x')"
    )


@pytest.mark.parametrize("family", ["AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
def test_other_socket_families(family: str) -> None:
    """Of these even an unconnected socket is attack surface; the filter says no."""
    assert_held(f"socket.socket(socket.{family}, socket.SOCK_RAW)")


def test_socketpairs_are_local() -> None:
    result = run("a, b = socket.socketpair()\na.send(b'event loops need this')\nprint(b.recv(99))")
    assert result.stdout == "b'event loops need this'\n"
    assert_held("socket.socketpair(socket.AF_INET, socket.SOCK_STREAM)")


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_unix_socket_of_the_host(tmp_path: Path, kind: str) -> None:
    name = f"\0recmas-{secrets.token_hex(8)}" if kind == "abstract" else str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        server.setblocking(False)
        attack = f"socket.socket(socket.AF_UNIX).connect({name!r})"
        assert_held(attack, errors=(*OS_ERRORS, "ConnectionRefusedError"))
        with pytest.raises(BlockingIOError):
            server.accept()
        assert_works_outside(attack)
        server.accept()


# Files and secrets


def test_password_files() -> None:
    assert_held("open('/etc/shadow').read()")
    if IS_BUBBLEWRAP:
        assert_held("open('/etc/passwd').read()")


def test_file_of_the_host(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    attack = f"open({str(secret)!r}).read()"
    assert_held(attack)
    assert_works_outside(attack)


def test_home_folder() -> None:
    home = Path.home()
    names = {path.name for path in home.iterdir()}
    result = run(f"if os.access({str(home)!r}, os.R_OK): print(*os.listdir({str(home)!r}))")
    seen = set(result.stdout.split())
    # The interpreter itself may live in the home folder; its folder is then all there is.
    prefix = Path(sys.base_prefix)
    own = {prefix.relative_to(home).parts[0]} if prefix.is_relative_to(home) else set()
    assert seen & names <= own
    assert_held(f"os.listdir({str(home / '.ssh')!r})")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", "tvly-secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:tvly-secret@proxy")
    result = run("print(dict(os.environ)); print(open('/proc/self/environ').read())")
    assert "PWD" in result.stdout or "PATH" in result.stdout
    assert "tvly-secret" not in result.stdout
    libc_view = run("libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'TAVILY_API_KEY'))")
    assert libc_view.stdout == "None\n"


def test_the_repository() -> None:
    attack = f"open({str(REPOSITORY / 'pyproject.toml')!r}).read()"
    assert_held(attack)
    assert_works_outside(attack)


def test_installed_packages() -> None:
    assert_held("import numpy", "import recmas_runtime", errors=("ModuleNotFoundError",))
    assert_works_outside("import numpy")


def test_inherited_files() -> None:
    with Path(__file__).open() as file:
        os.set_inheritable(file.fileno(), True)
        result = run(
            """
            found = []
            for fd in range(3, 1024):
                try: found.append((fd, os.fstat(fd)))
                except OSError: pass
            print(found)
            """
        )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    "place", ["/", "/etc", "/usr/lib", "/dev", "/dev/shm", "/var/tmp", "/home"]
)
def test_writing_outside_of_tmp(place: str) -> None:
    name = f"recmas-{secrets.token_hex(8)}"
    if IS_BUBBLEWRAP or place not in ("/dev/shm", "/var/tmp"):  # containers have their own
        assert_held(f"open({place + '/' + name!r}, 'w').write('x')")
    assert not Path(place, name).exists()


def test_writing_to_the_interpreter() -> None:
    before = Path(os.__file__).read_bytes()
    assert_held(
        "open(os.__file__, 'a').write('import evil')",
        "os.unlink(os.__file__)",
        "os.chmod(os.__file__, 0o777)",
        "open(os.path.join(os.path.dirname(os.__file__), 'site-packages', 'x.pth'), 'w')",
    )
    assert Path(os.__file__).read_bytes() == before


def test_tmp_is_private(tmp_path: Path) -> None:
    name = f"recmas-{secrets.token_hex(8)}"
    write = f"open('/tmp/{name}', 'w').write('x'); print(os.listdir('/tmp'))"
    assert name in run(write).stdout
    assert not Path("/tmp", name).exists()
    assert name not in run("print(os.listdir('/tmp'))").stdout


@pytest.mark.parametrize(
    "path", ["../" * 40 + "{secret}", "/proc/1/root{secret}", "/proc/self/cwd/../../..{secret}"]
)
def test_symbolic_links_to_the_host(tmp_path: Path, path: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    target = path.format(secret=secret)
    assert_held(
        f"os.symlink({target!r}, '/tmp/read')\nopen('/tmp/read').read()",
        f"os.symlink({target!r}, '/tmp/write')\nopen('/tmp/write', 'w').write('changed')",
        f"os.link({str(secret)!r}, '/tmp/hard')",
    )
    assert secret.read_text() == "secret"


def test_device_files() -> None:
    assert_held(
        "os.mknod('/tmp/disk', stat.S_IFBLK | 0o666, os.makedev(254, 0))",
        "open('/dev/mem', 'rb').read(1)",
        "open('/dev/kmsg').read(1)",
        "open('/dev/tty')",
    )


def test_files_by_handle() -> None:
    """Handles lead past mount namespaces: how an early container escape worked."""
    number = REFUSED["open_by_handle_at"][COLUMN]
    assert_held(f"syscall({number}, 0, 0, 0)", errors=FORBIDDEN)


# Processes and privileges


@contextmanager
def victim() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_killing_processes_of_the_host() -> None:
    with victim() as process:
        assert_held(f"os.kill({process.pid}, signal.SIGKILL)")
        run(f"os.kill({os.getpid()}, signal.SIGKILL)")
        run("os.kill(-1, signal.SIGKILL)")
        run("os.kill(1, signal.SIGKILL); os.killpg(0, signal.SIGKILL)")
        run("for pid in range(1, 2**15):\n  try: os.kill(pid, 9)\n  except OSError: pass")
        assert process.poll() is None


def test_tracing_the_parent() -> None:
    ptrace = REFUSED["ptrace"][COLUMN]
    attach, trace_me = (16, "os.getppid() or 1"), (0, 0)
    attacks = [f"syscall({ptrace}, {what}, {pid}, 0, 0)" for what, pid in (attach, trace_me)]
    assert_held(*attacks, errors=FORBIDDEN)


def test_reading_the_memory_of_others() -> None:
    assert_held(
        "open('/proc/1/mem', 'rb').read(1)",
        f"open('/proc/{os.getpid()}/mem', 'rb').read(1)",
        f"open('/proc/{os.getpid()}/environ', 'rb').read()",
    )


def test_mounting() -> None:
    assert_held(
        "if libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0): raise PermissionError",
        "if libc.umount2(b'/tmp', 2): raise PermissionError",
        "if libc.mount(b'none', b'/', b'none', 0x1020, 0): raise PermissionError",  # remount
        "os.chroot('/tmp')",
    )


def test_new_namespaces() -> None:
    machine = MACHINES[platform.machine()]
    user = 0x10000000
    flags = (user, 0x00020000, 0x20000000, 0x40000000, user | 0x00020000)
    assert_held(
        f"if libc.unshare({user}): raise PermissionError",
        *(f"syscall({machine.clone}, {flag} | 17, 0, 0, 0, 0)" for flag in flags),
        "if libc.setns(0, 0): raise PermissionError",
        errors=FORBIDDEN,
    )


def test_clone3_cannot_smuggle_flags_past_the_filter() -> None:
    number = MACHINES[platform.machine()].clone3
    result = run(attempt(f"syscall({number}, 0, 0)"))
    assert "Function not implemented" in result.stdout


def test_refused_system_calls() -> None:
    # Engines answer ENOSYS to these where they, or the library below them, do not know them yet.
    left_out = () if IS_BUBBLEWRAP else ("statmount", "listmount", "open_tree_attr")
    numbers = [row[COLUMN] for name, row in REFUSED.items() if name not in left_out]
    attacks = [f"syscall({n}, 0, 0, 0, 0, 0)" for n in numbers if n is not None]
    assert len(attacks) > 50
    assert_held(*attacks, errors=FORBIDDEN)


def test_a_harmless_call_that_is_not_listed() -> None:
    """Nothing speaks against inotify but that no program needs it: refused all the same."""
    attack = f"syscall({(294, 26)[COLUMN]}, 0)"  # inotify_init1
    assert_held(attack, errors=FORBIDDEN)
    assert_works_outside(attack)


def test_a_call_newer_than_the_filter() -> None:
    """It is missing, not forbidden, so that C libraries use the older one."""
    result = run(attempt(f"syscall({NEWEST + 1}, 0, 0, 0, 0, 0)"))
    assert "Function not implemented" in result.stdout


def test_ordinary_programs() -> None:
    """What Python's own modules do with the kernel must stay possible."""
    result = run(
        """
        import asyncio, decimal, multiprocessing, pathlib, shutil, sqlite3, tempfile
        sys.setrecursionlimit(20_000)
        def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
        threading.stack_size(64 << 20)
        found = []
        thread = threading.Thread(target=lambda: found.append(depth(15_000)))
        thread.start()
        thread.join()
        print(found, decimal.Decimal(2).sqrt(decimal.Context(prec=20)))
        child = multiprocessing.get_context('fork').Process(target=os._exit, args=(3,))
        child.start()
        child.join()
        print(child.exitcode, subprocess.check_output([sys.executable, '-c', 'print(4)']))
        async def ask():
            command = [sys.executable, '-c', 'print(5)']
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            return await process.communicate()
        print(asyncio.run(ask()))
        with sqlite3.connect('/tmp/table.db') as connection:
            connection.execute('create table t (x)')
            connection.execute('insert into t values (6)')
            print(*connection.execute('select x from t'))
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, 'a').write_text('x')
            shutil.copy2(folder + '/a', folder + '/b')
            os.symlink('b', folder + '/c')
            shutil.copytree(folder, '/tmp/copied', symlinks=True)
        print(sorted(os.listdir('/tmp/copied')))
        signal.signal(signal.SIGALRM, lambda *_: print('alarm'))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
        """
    )
    assert result.stdout.splitlines() == [
        "[15000] 1.4142135623730950488",
        "3 b'4\\n'",
        "(b'5\\n', None)",
        "(6,)",
        "['a', 'b', 'c']",
        "alarm",
    ], result


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ways around the filter of x86_64")
@pytest.mark.parametrize("way", ["x32", "i386"])
def test_other_system_call_tables(way: str) -> None:
    """The numbers mean other calls there, so a filter that looks at numbers only is blind."""
    attacks = {
        "x32": "syscall(0x40000000 | 39)",
        # mov eax, 20 (getpid); int 0x80; ret
        "i386": """
            page = mmap.mmap(-1, 4096, prot=7)
            page.write(bytes.fromhex('b814000000cd80c3'))
            ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        """,
    }
    result = run(attempt(attacks[way]))
    assert "ESCAPED" not in result.stdout
    assert result.exit_code == 128 + 31  # SIGSYS


def test_becoming_root() -> None:
    chown = "os.chown('/tmp/main.py', 0, 0)"
    assert_held("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", chown)
    assert run("print(os.getuid() == 0 or os.geteuid() == 0 or 0 in os.getgroups())").stdout == (
        "False\n"
    )


def test_no_capability_is_left() -> None:
    result = run(
        """
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)(*[7] * 6)
        assert libc.capget(header, data) == 0
        print(list(data))
        """
    )
    assert result.stdout == "[0, 0, 0, 0, 0, 0]\n"


def test_raising_limits() -> None:
    limits = ("AS", "NPROC", "FSIZE", "NOFILE", "CPU", "CORE")
    attacks = [f"resource.setrlimit(resource.RLIMIT_{name}, (2**40, 2**40))" for name in limits]
    assert_held(*attacks, errors=("ValueError", *OS_ERRORS))


def test_kernel_settings() -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    assert_held(
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/evil')",
        "open('/proc/sysrq-trigger', 'w').write('h')",
        "open('/sys/kernel/uevent_helper', 'w').write('/tmp/evil')",
        "open('/sys/fs/cgroup/release_agent', 'w').write('/tmp/evil')",
    )
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


# Using things up


def marked_processes(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


def assert_all_gone(mark: str) -> None:
    deadline = time.monotonic() + 10
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert marked_processes(mark) == []


def test_fork_bomb() -> None:
    result = run(
        """
        forks = 0
        for _ in range(2000):
            try:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                forks += 1
            except OSError:
                break
        print(forks)
        """
    )
    assert 0 < int(result.stdout) <= MAX_PROCESSES


def test_fork_bomb_that_never_ends() -> None:
    mark = f"recmas-{secrets.token_hex(8)}"
    code = f"""
        while True:
            try:
                if os.fork() == 0 and os.fork() == 0:
                    os.execv(sys.executable, [sys.executable, '-c', 'while 1: pass', {mark!r}])
            except OSError:
                pass
    """
    assert run(code, timeout_s=STOP_AFTER_S).status in ("timeout", "error")
    assert_all_gone(mark)
    assert run("print('still fine')").stdout == "still fine\n"


def test_thread_bomb() -> None:
    result = run(
        """
        threads = 0
        try:
            while threads < 5000:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                threads += 1
        except RuntimeError:
            pass
        print(threads, flush=True)
        os._exit(0)
        """
    )
    assert 0 < int(result.stdout) <= MAX_PROCESSES


def test_memory_bomb() -> None:
    result = run("hog = []\nwhile True: hog.append(bytearray(1 << 20))", memory_mb=128)
    assert result.status == "error"
    assert "MemoryError" in result.stderr_tail or "stopped: " in result.stderr_tail


def test_memory_bomb_of_many_processes() -> None:
    """Limits count each process alone; together these would hold 3 GiB."""
    result = run(
        """
        for _ in range(20):
            if os.fork() == 0:
                hog = bytearray(b'x') * (150 << 20)
                time.sleep(60)
                os._exit(0)
        time.sleep(60)
        """,
        memory_mb=256,
    )
    assert result.status != "ok"
    if IS_BUBBLEWRAP:
        assert "stopped: its processes together use more than 256 MiB" in result.stderr_tail


def test_memory_in_shared_segments() -> None:
    result = run(
        """
        maps = []
        for _ in range(20):
            if os.fork() == 0:
                shared = mmap.mmap(-1, 150 << 20)
                for _ in range(150):
                    shared.write(b'x' * (1 << 20))
                time.sleep(60)
        time.sleep(60)
        """,
        memory_mb=256,
    )
    assert result.status != "ok"
    if IS_BUBBLEWRAP:
        assert "stopped: its processes together use more than 256 MiB" in result.stderr_tail


def test_endless_loop() -> None:
    result = run("print('begun', flush=True)\nwhile True: pass", timeout_s=STOP_AFTER_S)
    assert (result.status, result.stdout, result.exit_code) == ("timeout", "begun\n", None)


def test_ignoring_signals() -> None:
    mark = f"recmas-{secrets.token_hex(8)}"
    program = (
        "import signal\n"
        "for number in range(1, 65):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "print('begun', flush=True)\n"
        "while True: pass"
    )
    result = run(
        f"os.execv(sys.executable, [sys.executable, '-c', {program!r}, {mark!r}])",
        timeout_s=STOP_AFTER_S,
    )
    assert (result.status, result.stdout) == ("timeout", "begun\n")
    assert_all_gone(mark)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(stream: str) -> None:
    result = run(f"while True: sys.{stream}.write('x' * 10_000)", timeout_s=20)
    assert result.status == "error"
    assert len(result.stdout) <= MAX_OUTPUT_BYTES
    assert result.stderr_tail.endswith("stopped: it wrote more than 1 MiB")


@pytest.mark.parametrize("parent", ["ends", "is stopped"])
def test_child_that_outlives_its_parent(parent: str) -> None:
    mark = f"recmas-{secrets.token_hex(8)}"
    control = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark])
    try:
        while not marked_processes(mark):  # until it has started
            assert control.poll() is None
    finally:
        control.kill()
        control.wait()
    code = f"""
        sleeper = [sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}]
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork():
                    os._exit(0)
                os.execv(sys.executable, sleeper)
        time.sleep(0.5)
        print('begun', flush=True)
        while {parent == "is stopped"}: pass
    """
    result = run(code, timeout_s=STOP_AFTER_S)
    assert result.stdout == "begun\n"
    assert result.status == ("timeout" if parent == "is stopped" else "ok")
    assert_all_gone(mark)


def test_big_file() -> None:
    result = run(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = 0
        try:
            with open('/tmp/big', 'wb', buffering=0) as file:
                while size < 1 << 30:
                    size += file.write(bytes(1 << 20))
        except OSError:
            pass
        print(size)
        """
    )
    assert 0 < int(result.stdout) <= MAX_FILE_BYTES


def test_filling_tmp() -> None:
    result = run(
        """
        size = 0
        try:
            for number in range(1000):
                with open(f'/tmp/{number}', 'wb', buffering=0) as file:
                    size += file.write(bytes(1 << 20))
        except OSError:
            pass
        print(size)
        """
    )
    assert 0 < int(result.stdout) <= MAX_TMP_BYTES


def test_filling_tmp_with_empty_files() -> None:
    result = run(
        """
        for number in range(10**7):
            os.close(os.open(f'/tmp/{number}', os.O_CREAT))
        """
    )
    assert result.status != "ok"
    if IS_BUBBLEWRAP:
        assert result.stderr_tail.endswith(f"stopped: it made more than {MAX_TMP_FILES} files")


def test_input_that_nobody_reads() -> None:
    result = sandbox().run("print(1)", stdin="x" * (4 << 20), timeout_s=20, memory_mb=256)
    assert (result.status, result.stdout) == ("ok", "1\n")


def test_closing_every_stream_does_not_hide_a_process() -> None:
    result = run("[os.close(fd) for fd in range(3)]\nwhile True: pass", timeout_s=STOP_AFTER_S)
    assert result.status == "timeout"


def test_code_cannot_forge_the_launcher() -> None:
    """The code's length is counted in bytes; what follows it is input and nothing else."""
    code = "import sys\nprint(sys.stdin.read(), '\u00e9')"
    result = sandbox().run(code, stdin="import os", timeout_s=20, memory_mb=256)
    assert result.stdout == "import os \u00e9\n"
