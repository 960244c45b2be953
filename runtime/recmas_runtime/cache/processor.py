"""What tells a processor from others: libraries choose their instructions by it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Final

# Of the first processor of Linux, what says which code libraries choose.
_TOLD: Final = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")


def processor() -> dict[str, object]:
    """Return the system, the architecture and what is known of the processor, as JSON."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": platform.processor(),
        "cpu": cpu_facts(Path("/proc/cpuinfo")),
    }


def cpu_facts(cpuinfo: Path) -> dict[str, str]:
    """Return what Linux says of the first processor; nothing elsewhere."""
    try:
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    told = {name.strip(): value.strip() for name, _, value in pairs}
    return {name: told[name] for name in _TOLD if name in told}
