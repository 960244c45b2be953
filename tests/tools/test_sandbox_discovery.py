"""Which sandbox is used, and that one which does not hold never is."""

from __future__ import annotations

import errno
import os
import platform
import pty
import re
import struct
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from recmas_runtime.cli.main import main
from recmas_runtime.tools import find_sandbox, terminal_ask
from recmas_runtime.tools.sandbox import SandboxResult, survey_sandboxes
from recmas_runtime.tools.sandbox.discovery import failing
from recmas_runtime.tools.sandbox.seccomp import (
    MACHINES,
    NEWEST,
    Machine,
    filter_program,
    oci_profile,
)
from refused_calls import REFUSED


def test_nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    survey = survey_sandboxes()
    assert survey.sandbox is None
    assert find_sandbox() is None
    assert survey.reasons == {
        "bubblewrap": "`bwrap` is not installed",
        "docker": "`docker` is not installed",
        "podman": "`podman` is not installed",
    }


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    path.chmod(0o755)


def test_reasons_are_what_the_programs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(
        tmp_path / "bwrap", "echo 'bwrap: No permissions to create new namespace' >&2; exit 1"
    )
    executable(tmp_path / "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    executable(tmp_path / "podman", "exit 125")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RECMAS_SANDBOX_IMAGE", "my/python:1")
    survey = survey_sandboxes()
    assert survey.sandbox is None
    assert survey.reasons == {
        "bubblewrap": "a harmless program does not run in it: "
        "bwrap: No permissions to create new namespace",
        "docker": "image my/python:1 cannot be used: Cannot connect to the Docker daemon",
        "podman": "image my/python:1 cannot be used: no reason given",
    }


class Bare:
    """What a sandbox must not be: a plain process."""

    name = "bare"

    def run(
        self,
        code: str,
        *,
        stdin: str = "",
        timeout_s: float,
        memory_mb: int,
        packages: Sequence[str] = (),
    ) -> SandboxResult:
        ran = subprocess.run(
            [sys.executable, "-c", code],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return SandboxResult(
            status="ok" if ran.returncode == 0 else "error",
            stdout=ran.stdout,
            stderr_tail=ran.stderr,
            exit_code=ran.returncode,
            ms=0.0,
        )


def test_a_sandbox_that_does_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letters").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    said = failing(Bare())
    assert said.startswith("it does not hold: ")
    doors = ["network", "a file of the host", "the home folder"]
    for door in [*doors, f"writing to {tmp_path}"]:
        assert door in said
    assert not list(tmp_path.glob("recmas-trial-*"))


def test_the_sandbox_in_use_holds() -> None:
    found = find_sandbox()
    if found is None:
        pytest.skip(f"no sandbox here: {dict(survey_sandboxes().reasons)}")
    assert failing(found) == ""
    assert find_sandbox() is found  # tried once


# The filter, run by an interpreter of its language: also for the machine that this is not.

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def verdict(machine: Machine, number: int, *arguments: int, audit: int | None = None) -> int:
    data = struct.pack("<iIQ6Q", number, audit or machine.audit, 0, *(*arguments, *[0] * 6)[:6])
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    position, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = program[position]
        position += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x06:
                return value
            case 0x15:
                position += if_true if accumulator == value else if_false
            case 0x35:
                position += if_true if accumulator >= value else if_false
            case 0x45:
                position += if_true if accumulator & value else if_false
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


@pytest.mark.parametrize("name", MACHINES)
def test_filter(name: str) -> None:
    machine = MACHINES[name]
    special = {machine.clone, machine.clone3, machine.socketpair}
    for number in range(600):
        if number in machine.allowed.values():
            expected = ALLOW
        else:
            expected = ERRNO | (errno.EPERM if number <= NEWEST else errno.ENOSYS)
        if number not in special:
            assert verdict(machine, number) == expected, number
    assert verdict(machine, machine.clone3) == ERRNO | errno.ENOSYS
    assert verdict(machine, machine.clone, 17) == ALLOW  # fork
    assert verdict(machine, machine.clone, 0x3D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, machine.clone, flag | 17) == ERRNO | errno.EPERM
    assert verdict(machine, machine.socketpair, 1) == ALLOW
    for family in (0, 2, 10, 16, 17, 40):
        assert verdict(machine, machine.socketpair, family) == ERRNO | errno.EPERM
    assert verdict(machine, 0x40000000 | 39) == KILL
    assert verdict(machine, 39, audit=0x40000003) == KILL  # i386


@pytest.mark.parametrize("name", MACHINES)
def test_no_dangerous_call_is_allowed(name: str) -> None:
    machine = MACHINES[name]
    assert not set(REFUSED) & set(machine.allowed)
    numbers = [row[list(MACHINES).index(name)] for row in REFUSED.values()]
    for number in (number for number in numbers if number is not None):
        assert verdict(machine, number) == ERRNO | errno.EPERM, number


@pytest.mark.parametrize("name", MACHINES)
def test_container_engines_get_the_same_filter(name: str) -> None:
    machine = MACHINES[name]
    profile = oci_profile(machine)
    allowed, clone, socketpair, clone3 = profile["syscalls"]
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert {rule["action"] for rule in (allowed, clone, socketpair)} == {"SCMP_ACT_ALLOW"}
    assert allowed["names"] == sorted(machine.allowed)
    masked = {"index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0x7E020000, "valueTwo": 0}
    assert (clone["names"], clone["args"]) == (["clone"], [masked])
    assert socketpair["args"] == [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1}]
    assert (clone3["action"], clone3["errnoRet"]) == ("SCMP_ACT_ERRNO", errno.ENOSYS)


@pytest.mark.parametrize("name", MACHINES)
def test_no_system_call_is_listed_twice(name: str) -> None:
    machine = MACHINES[name]
    numbers = [*machine.allowed.values(), machine.clone, machine.clone3, machine.socketpair]
    assert len(numbers) == len(set(numbers))
    assert max(numbers) <= NEWEST


@pytest.mark.parametrize(
    ("name", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernel(name: str, header: str) -> None:
    """Checked wherever the kernel's headers are installed; a wrong number allows another call."""
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip(f"no {path}: the kernel's headers are not installed")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text(encoding="ascii"))
    numbers = {call: int(number) for call, number in found}
    machine = MACHINES[name]
    # What the generic header calls by its 32-bit name.
    numbers.setdefault("newfstatat", numbers.get("fstatat", -1))
    for call, number in machine.allowed.items():
        # Older kernels' headers lack the newest calls; from 424 on all machines count alike.
        assert numbers.get(call, number if number >= 424 else -1) == number, call
    for call in ("clone", "clone3", "socketpair"):
        assert numbers[call] == getattr(machine, call)


# Runs the program in its second argument under the filter alone, without a sandbox around it.
UNDER_THE_FILTER = """
import ctypes, os, sys

class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

libc = ctypes.CDLL(None, use_errno=True)
instructions = bytes.fromhex(sys.argv[1])
program = Program(len(instructions) // 8, instructions)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(program)) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, filter
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="no filter for this machine")
def test_numpy_runs_under_the_filter(tmp_path: Path) -> None:
    """The sandbox of bubblewrap shows no packages, but an image may hold them."""
    code = f"""
        import os
        os.environ["OPENBLAS_NUM_THREADS"] = "2"
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np
        os.chdir({str(tmp_path)!r})
        square = np.random.default_rng(7).normal(size=(300, 300))
        with ThreadPoolExecutor(4) as pool:
            inverses = list(pool.map(np.linalg.inv, [square] * 4))
        assert all(np.allclose(square @ inverse, np.eye(300)) for inverse in inverses)
        assert np.linalg.eigvalsh(square + square.T).shape == (300,)
        np.save("square.npy", square)
        assert (np.load("square.npy", mmap_mode="r") == square).all()
        np.savez_compressed("two.npz", a=square, b=np.fft.rfft(square))
        assert np.load("two.npz")["b"].shape == (300, 151)
        import socket
        try:
            socket.socket()
        except PermissionError:
            print("done, and filtered")
    """
    instructions = filter_program(MACHINES[platform.machine()]).hex()
    ran = subprocess.run(
        [sys.executable, "-c", UNDER_THE_FILTER, instructions, textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "done, and filtered\n"), ran.stderr


# What `recmas doctor` says, and the human at the terminal


def test_doctor_tells_why_there_is_no_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TAVILY_API_KEY", "tvly-secret")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(
        "sandbox         none: the tool `python` refuses to run programs\n"
        "- bubblewrap    `bwrap` is not installed\n"
        "- docker        `docker` is not installed\n"
        "- podman        `podman` is not installed\n"
        "web search      TAVILY_API_KEY is set\n"
        "\n"
        "This machine can run bundles on the CPU.\n"
    )
    assert "bm25s" in text
    monkeypatch.delenv("TAVILY_API_KEY")
    assert main(["doctor"]) == 0
    assert "web search      TAVILY_API_KEY is not set\n" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert "tvly-secret" not in text + capsys.readouterr().out


def test_without_a_terminal_nobody_is_asked() -> None:
    assert terminal_ask() is None  # pytest's own standard input is none


def test_asking_at_a_terminal() -> None:
    """The question must not steer the terminal; the reply is one line."""
    code = """
        from recmas_runtime.tools import terminal_ask
        ask = terminal_ask()
        print("asked", repr(ask("How many?\\x1b[2J")), flush=True)
        try:
            ask("And now?")
        except EOFError as error:
            print(f"ended: {error}", flush=True)
    """
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(code)])
    said = b""
    try:
        while b"> " not in said:
            said += os.read(fd, 1024)
        os.write(fd, b"  3 fields \n")
        while b"And now?" not in said:
            said += os.read(fd, 1024)
        os.write(fd, b"\x04")
        while b"has ended" not in said:
            said += os.read(fd, 1024)
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    assert b"The agent asks: How many?\\x1b[2J\r\n> " in said
    assert b"asked '3 fields'" in said
    assert b"ended: nobody answered" in said


def test_packages_are_shown_where_they_are_asked_for() -> None:
    sandbox = find_sandbox()
    if sandbox is None or sandbox.name != "bubblewrap":
        pytest.skip("this machine has no bubblewrap")
    code = (
        "import importlib.util as u, numpy\n"
        "print(numpy.linalg.inv(numpy.eye(2)).sum(), u.find_spec('msgspec'))\n"
        "try:\n"
        "    open(numpy.__file__, 'a')\n"
        "except OSError:\n"
        "    print('read only')\n"
    )
    ran = sandbox.run(code, timeout_s=20, memory_mb=512, packages=("numpy", "no_such_package"))
    assert (ran.status, ran.stdout) == ("ok", "2.0 None\nread only\n"), ran.stderr_tail
    without = sandbox.run(code, timeout_s=20, memory_mb=512)
    assert "No module named 'numpy'" in without.stderr_tail
