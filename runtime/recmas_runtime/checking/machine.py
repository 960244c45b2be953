"""What this machine has: the facts behind `recmas doctor` and every measurement."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.errors import how_to_install
from recmas_runtime.core.text import human_bytes, listed

PACKAGES: Final = (
    "recmas",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tokenizers",
    "jinja2",
    "bm25s",
    "tensorrt",
    "cuda-bindings",
)


# What a bundle runs on; of the last two, one is enough.
_RUNS_ON: Final = ("numpy", "tokenizers", "jinja2", "msgspec", "safetensors")
_CUDA: Final = "CUDAExecutionProvider"
_ENGINES: Final = ("onnxruntime", "onnxruntime-gpu")


def describe_machine() -> dict[str, Any]:
    """Return versions, providers, CPU, memory, disk and tools; works without ONNX Runtime."""
    from recmas_runtime.engines.onnx.session import onnx_runtime, physical_cores
    from recmas_runtime.tools.sandbox import survey_sandboxes
    from recmas_runtime.tools.search import KEY_VARIABLE

    available = _entry("/proc/meminfo", "MemAvailable:")
    sandboxes = survey_sandboxes()
    versions = package_versions(PACKAGES)
    installed = versions["onnxruntime"] or versions["onnxruntime-gpu"]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "missing": _missing(),
        "providers": list(onnx_runtime().get_available_providers()) if installed else [],
        "cpu": _entry("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "logical_cpus": os.cpu_count(),
        "default_threads": physical_cores(),
        "memory_bytes": total_memory_bytes(),
        "memory_available_bytes": int(available.split()[0]) * 1024 if available else None,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "telemetry": False,
        "sandbox": sandboxes.sandbox.name if sandboxes.sandbox is not None else None,
        "sandboxes_not_used": {name: why for name, why in sandboxes.reasons.items() if why},
        "web_search_key": bool(os.environ.get(KEY_VARIABLE)),
    }


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of packages; None for those that are not installed."""
    found: dict[str, str | None] = dict.fromkeys(names)
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def total_memory_bytes() -> int | None:
    """Return the memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_resident_bytes() -> int:
    """Return the most resident memory of this process so far.

    What getrusage tells begins with the peak of the process that started this one, so it is asked
    only where Linux's /proc is not.
    """
    told = peak_resident_bytes_of(os.getpid())
    if told is not None:
        return told
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_resident_bytes_of(pid: int) -> int | None:
    """Return the most resident memory of a process so far; None where nobody tells."""
    told = _entry(f"/proc/{pid}/status", "VmHWM:")
    return int(told.split()[0]) * 1024 if told else None


def machine_text(facts: Mapping[str, Any]) -> str:
    """Return what `doctor` prints."""
    available = human_bytes(facts["memory_available_bytes"])
    rows = [("python", facts["python"]), ("platform", facts["platform"])]
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    rows += [
        ("providers", ", ".join(facts["providers"]) or "none"),
        ("cpu", f"{facts['cpu']}, {facts['logical_cpus']} logical"),
        ("threads", f"{facts['default_threads']} by default"),
        ("memory", f"{available} of {human_bytes(facts['memory_bytes'])}"),
        ("disk free", human_bytes(facts["disk_free_bytes"])),
        ("telemetry", "on" if facts["telemetry"] else "off"),
        ("sandbox", facts["sandbox"] or "none: the tool `python` refuses to run programs"),
    ]
    rows += [(f"- {name}", reason) for name, reason in facts["sandboxes_not_used"].items()]
    rows.append(("web search", f"TAVILY_API_KEY is {'' if facts['web_search_key'] else 'not '}set"))
    lines = [f"{name:<16}{value}" for name, value in rows]
    on_cuda = " on the CPU and on CUDA" if _CUDA in facts["providers"] else " on the CPU"
    lines += ["", verdict("run bundles", facts["missing"], extra="cpu", detail=on_cuda)]
    return "\n".join(lines)


def verdict(what: str, missing: Sequence[str], *, extra: str, detail: str = "") -> str:
    """Return the last line of a survey: whether this machine can do it, or what it lacks."""
    if not missing:
        return f"This machine can {what}{detail}."
    verb = "is" if len(missing) == 1 else "are"
    return (
        f"This machine cannot {what}: {listed(missing)} {verb} not installed. "
        f"{how_to_install(extra)}"
    )


def _missing() -> list[str]:
    """Return the packages that are needed and not there."""
    versions = package_versions((*_RUNS_ON, *_ENGINES))
    missing = [name for name in _RUNS_ON if versions[name] is None]
    has_engine = any(versions[name] is not None for name in _ENGINES)
    return missing if has_engine else [*missing, _ENGINES[0]]


def _entry(path: str, key: str) -> str | None:
    """Return what a table of the kernel says of a key; None where there is no such table or key."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)
