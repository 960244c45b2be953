"""Disks that are full or read-only, for one process: mounts that nothing else sees."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from faults.outcome import forked

_NEW_MOUNTS: Final = 0x00020000
_NEW_USERS: Final = 0x10000000
_READ_ONLY, _AGAIN, _BOUND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def in_own_mounts(action: Callable[[], list[str]], *, limit_s: float) -> list[str] | None:
    """Run `action` where it may mount; return what it returns, None if mounting is not allowed."""

    def inside() -> int:
        try:
            _enter()
        except OSError:
            return 77
        sys.stdout.write(json.dumps(action()))
        return 0

    outcome = forked(inside, limit_s=limit_s)
    if outcome.status == 77:
        return None
    if outcome.status != 0:
        return [f"the case itself ended with {outcome.status}: {outcome.text[-2000:]}"]
    found: list[str] = json.loads(outcome.stdout)
    return found


def _enter() -> None:
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS | (0 if user == 0 else _NEW_USERS)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def disk_of(place: Path, num_bytes: int, *, grown: bool = False) -> None:
    """Mount an empty disk of a size at `place`, or give the one there another size."""
    _mount("none", str(place), "tmpfs", _AGAIN if grown else 0, f"size={num_bytes}")


def read_only(place: Path) -> None:
    """Let nothing below `place` be written any more."""
    _mount(str(place), str(place), None, _BOUND)
    _mount(str(place), str(place), None, _BOUND | _AGAIN | _READ_ONLY)


def writable(place: Path) -> None:
    """Undo `read_only`."""
    libc = ctypes.CDLL(None, use_errno=True)
    for _ in range(2):  # two mounts, one above the other
        libc.umount2(str(place).encode(), 0)


def _mount(
    source: str, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [None if t is None else t.encode() for t in (source, target, kind, options)]
    if libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")
