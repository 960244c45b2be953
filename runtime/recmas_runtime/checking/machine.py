"""What this machine has: the facts behind `recmas doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any, Final

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


def describe_machine() -> dict[str, Any]:
    """Return versions, providers, CPU, memory, disk and tools; works without ONNX Runtime."""
    from recmas_runtime.engines.onnx.session import onnx_runtime, physical_cores
    from recmas_runtime.tools.sandbox import survey_sandboxes
    from recmas_runtime.tools.search import KEY_VARIABLE

    sandboxes = survey_sandboxes()
    versions = {name: _version(name) for name in PACKAGES}
    installed = versions["onnxruntime"] or versions["onnxruntime-gpu"]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "providers": list(onnx_runtime().get_available_providers()) if installed else [],
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "default_threads": physical_cores(),
        "memory_bytes": _meminfo_bytes("MemTotal"),
        "memory_available_bytes": _meminfo_bytes("MemAvailable"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "telemetry": False,
        "sandbox": sandboxes.sandbox.name if sandboxes.sandbox is not None else None,
        "sandboxes_not_used": {name: why for name, why in sandboxes.reasons.items() if why},
        "web_search_key": bool(os.environ.get(KEY_VARIABLE)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _meminfo_bytes(key: str) -> int | None:
    """Return an entry of /proc/meminfo; None where there is no such file."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
