"""How much memory this process has taken at most."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import Final

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")
_PEAK: Final = "5"


def restart_peak() -> None:
    """Forget the peak so far, where the system can: on Linux."""
    with contextlib.suppress(OSError):
        _RESET.write_text(_PEAK)


def peak_resident_bytes() -> int:
    """Return the most resident memory since `restart_peak`, or since the start of the process."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024
