"""The system calls that a sandboxed program may make, as a seccomp filter program.

Namespaces and the missing file system already close most doors. The filter allows what Python's
standard library, numpy and the C library below them need, and nothing else: no sockets, mounts,
namespaces, tracing, keys, BPF, io_uring, and no memory that a process's limits do not count.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# Classic BPF instructions (linux/filter.h) and seccomp's results (linux/seccomp.h).
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_IF_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_IF_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_ALLOW: Final = 0x7FFF0000
_KILL_PROCESS: Final = 0x80000000
_REFUSE: Final = 0x00050000  # SECCOMP_RET_ERRNO; the error number is in the low half

# Offsets in struct seccomp_data. Both machines are little endian: an argument's low word is first.
_NUMBER: Final = 0
_ARCHITECTURE: Final = 4
_FIRST_ARGUMENT: Final = 16

_X32_BIT: Final = 0x40000000  # x86_64's second table of system calls
_AF_UNIX: Final = 1
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_NEW_NAMESPACES: Final = 0x7E020000

# The newest system call that the choice of calls has considered (open_tree_attr, Linux 6.15).
NEWEST: Final = 467

_CALLS: Final = Path(__file__).with_name("seccomp_calls.txt")


@dataclass(frozen=True)
class Machine:
    """A machine that the filter can be written for.

    Attributes:
        oci_name: What container engines call it.
        audit: Its AUDIT_ARCH number.
        allowed: System call -> its number, of those that are allowed whatever their arguments.
    """

    oci_name: str
    audit: int
    allowed: dict[str, int]
    clone: int
    clone3: int
    socketpair: int


def _allowed(column: int) -> dict[str, int]:
    """Return the calls of one column of the table."""
    text = _CALLS.read_text(encoding="ascii")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    words = " ".join(lines).split()
    rows = zip(words[::3], words[column::3], strict=True)
    return {name: int(number) for name, number in rows if number != "-"}


MACHINES: Final = {
    "x86_64": Machine(
        "SCMP_ARCH_X86_64", 0xC000003E, _allowed(1), clone=56, clone3=435, socketpair=53
    ),
    "aarch64": Machine(
        "SCMP_ARCH_AARCH64", 0xC00000B7, _allowed(2), clone=220, clone3=435, socketpair=199
    ),
}


def filter_program(machine: Machine) -> bytes:
    """Return the filter as the kernel takes it: an array of struct sock_filter.

    1. A system call of another architecture's table kills: its numbers mean other calls.
    2. What the table allows goes through.
    3. clone goes through unless it asks for a new namespace.
    4. socketpair goes through for local sockets, which event loops need.
    5. clone3 fails with ENOSYS, because a filter cannot see its flags; C libraries then use clone.
    6. Calls newer than the table fail with ENOSYS too: C libraries have a way around new calls that
       are missing, but none around ones that are forbidden.
    7. Everything else fails with EPERM.
    """
    program = [
        _instruction(_LOAD_WORD, _ARCHITECTURE),
        _instruction(_JUMP_IF_EQUAL, machine.audit, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD_WORD, _NUMBER),
        _instruction(_JUMP_IF_AT_LEAST, _X32_BIT, if_false=1),
        _instruction(_RETURN, _KILL_PROCESS),
    ]
    for number in sorted(machine.allowed.values()):
        program += [
            _instruction(_JUMP_IF_EQUAL, number, if_false=1),
            _instruction(_RETURN, _ALLOW),
        ]
    program += [
        _instruction(_JUMP_IF_EQUAL, machine.clone, if_false=4),
        _instruction(_LOAD_WORD, _FIRST_ARGUMENT),
        _instruction(_JUMP_IF_ANY_BIT, _NEW_NAMESPACES, if_true=1),
        _instruction(_RETURN, _ALLOW),
        _instruction(_RETURN, _REFUSE | errno.EPERM),
        _instruction(_JUMP_IF_EQUAL, machine.socketpair, if_false=3),
        _instruction(_LOAD_WORD, _FIRST_ARGUMENT),
        _instruction(_JUMP_IF_EQUAL, _AF_UNIX, if_false=4),
        _instruction(_RETURN, _ALLOW),
        _instruction(_JUMP_IF_EQUAL, machine.clone3, if_true=1),
        _instruction(_JUMP_IF_AT_LEAST, NEWEST + 1, if_false=1),
        _instruction(_RETURN, _REFUSE | errno.ENOSYS),
        _instruction(_RETURN, _REFUSE | errno.EPERM),
    ]
    return b"".join(program)


def oci_profile(machine: Machine) -> dict[str, Any]:
    """Return the same filter in the form that container engines take.

    Rule 6 is the engine's own: runc answers ENOSYS to what is newer than the names it is given.
    """
    allow = {"action": "SCMP_ACT_ALLOW"}
    no_namespace = {"op": "SCMP_CMP_MASKED_EQ", "value": _NEW_NAMESPACES, "valueTwo": 0}
    local = {"op": "SCMP_CMP_EQ", "value": _AF_UNIX}
    return {
        "defaultAction": "SCMP_ACT_ERRNO",  # EPERM, unless the profile says otherwise
        # Calls by the number of another architecture kill.
        "architectures": [machine.oci_name],
        "syscalls": [
            {"names": sorted(machine.allowed), **allow},
            {"names": ["clone"], "args": [{"index": 0, **no_namespace}], **allow},
            {"names": ["socketpair"], "args": [{"index": 0, **local}], **allow},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }


def _instruction(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
