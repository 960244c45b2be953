"""The system calls that a sandboxed program may make, as a seccomp filter program.

Namespaces and the missing file system already close most doors. The filter allows what Python's
standard library, numpy and the C library below them need, and nothing else: no sockets, mounts,
namespaces, tracing, keys, BPF, io_uring, and no memory that a process's limits do not count.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
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

# The newest system call that this table's choice has considered (open_tree_attr, Linux 6.15).
NEWEST: Final = 467

# System call, number on x86_64, number on aarch64; - where a machine does not have it. Numbers are
# those of arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_TABLE: Final = """
# Files that are open
read 0 63               write 1 64              readv 19 65             writev 20 66
pread64 17 67           pwrite64 18 68          preadv 295 69           pwritev 296 70
preadv2 327 286         pwritev2 328 287        lseek 8 62              close 3 57
close_range 436 436     dup 32 23               dup2 33 -               dup3 292 24
fcntl 72 25             ioctl 16 29             flock 73 32             sendfile 40 71
copy_file_range 326 285 ftruncate 77 46         fallocate 285 47        fadvise64 221 223
fsync 74 82             fdatasync 75 83         fstat 5 80              fstatfs 138 44
fchmod 91 52            fchown 93 55            fchdir 81 50            getdents 78 -
getdents64 217 61
# Files by their paths
open 2 -                creat 85 -              openat 257 56           stat 4 -
lstat 6 -               newfstatat 262 79       statx 332 291           statfs 137 43
access 21 -             faccessat 269 48        faccessat2 439 439      readlink 89 -
readlinkat 267 78       truncate 76 45          rename 82 -             renameat 264 38
renameat2 316 276       link 86 -               linkat 265 37           unlink 87 -
unlinkat 263 35         symlink 88 -            symlinkat 266 36        mkdir 83 -
mkdirat 258 34          rmdir 84 -              mknod 133 -             mknodat 259 33
chmod 90 -              fchmodat 268 53         fchmodat2 452 452       chown 92 -
lchown 94 -             fchownat 260 54         utime 132 -             utimes 235 -
utimensat 280 88        getcwd 79 17            chdir 80 49             umask 95 166
getxattr 191 8          lgetxattr 192 9         fgetxattr 193 10        listxattr 194 11
llistxattr 195 12       flistxattr 196 13       setxattr 188 5          lsetxattr 189 6
fsetxattr 190 7         removexattr 197 14      lremovexattr 198 15     fremovexattr 199 16
# Pipes, event loops and pairs of local sockets; socketpair itself is checked by its arguments
pipe 22 -               pipe2 293 59            poll 7 -                ppoll 271 73
select 23 -             pselect6 270 72         epoll_create 213 -      epoll_create1 291 20
epoll_ctl 233 21        epoll_wait 232 -        epoll_pwait 281 22      eventfd 284 -
eventfd2 290 19         timerfd_create 283 85   timerfd_settime 286 86  timerfd_gettime 287 87
sendto 44 206           sendmsg 46 211          sendmmsg 307 269        recvfrom 45 207
recvmsg 47 212          recvmmsg 299 243        shutdown 48 210         getsockname 51 204
getpeername 52 205      getsockopt 55 209       setsockopt 54 208
# Memory
brk 12 214              mmap 9 222              munmap 11 215           mremap 25 216
mprotect 10 226         madvise 28 233          msync 26 227            membarrier 324 283
map_shadow_stack 453 453
# Threads and locks; clone is checked by its arguments
futex 202 98            set_robust_list 273 99  set_tid_address 218 96  rseq 334 293
gettid 186 178          tgkill 234 131          tkill 200 130           sched_yield 24 124
sched_getaffinity 204 123                       sched_setaffinity 203 122
sched_getparam 143 121  sched_setparam 142 118  sched_getscheduler 145 120
sched_setscheduler 144 119                      sched_get_priority_max 146 125
sched_get_priority_min 147 126                  sched_rr_get_interval 148 127
getcpu 309 168          arch_prctl 158 -
# Its own processes
fork 57 -               vfork 58 -              execve 59 221           execveat 322 281
exit 60 93              exit_group 231 94       wait4 61 260            waitid 247 95
kill 62 129             pidfd_open 434 434      pidfd_send_signal 424 424
getpid 39 172           getppid 110 173         getpgid 121 155         getpgrp 111 -
setpgid 109 154         getsid 124 156          setsid 112 157          prctl 157 167
getrlimit 97 163        setrlimit 160 164       prlimit64 302 261       getrusage 98 165
getpriority 140 141     setpriority 141 140     times 100 153
# Signals
rt_sigaction 13 134     rt_sigprocmask 14 135   rt_sigreturn 15 139     rt_sigpending 127 136
rt_sigsuspend 130 133   rt_sigtimedwait 128 137 sigaltstack 131 132     pause 34 -
restart_syscall 219 128
# Users and capabilities: the launcher gives root up with these; nobody gains anything by them
getuid 102 174          geteuid 107 175         getgid 104 176          getegid 108 177
getresuid 118 148       getresgid 120 150       getgroups 115 158       setuid 105 146
setgid 106 144          setreuid 113 145        setregid 114 143        setresuid 117 147
setresgid 119 149       setgroups 116 159       capget 125 90           capset 126 91
# Time, random numbers and the description of the machine
time 201 -              gettimeofday 96 169     clock_gettime 228 113   clock_getres 229 114
nanosleep 35 101        clock_nanosleep 230 115 alarm 37 -              getitimer 36 102
setitimer 38 103        getrandom 318 278       uname 63 160            sysinfo 99 179
"""


@dataclass(frozen=True)
class Machine:
    """A machine that the filter can be written for.

    Attributes:
        oci_name: What container engines call it.
        audit: Its AUDIT_ARCH number.
        allowed: System call -> its number, of those that are allowed whatever their arguments.
        clone: Number of clone.
        clone3: Number of clone3.
        socketpair: Number of socketpair.
    """

    oci_name: str
    audit: int
    allowed: dict[str, int]
    clone: int
    clone3: int
    socketpair: int


def _allowed(column: int) -> dict[str, int]:
    """Return the calls of one column of the table."""
    lines = (line for line in _TABLE.splitlines() if not line.startswith("#"))
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
