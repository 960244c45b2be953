"""`recmas` in a process of its own, where stand-ins for TensorRT and CUDA are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIMULATED = Path(__file__).parent / "simulated"

# What a command printed and its exit status.
Ran = subprocess.CompletedProcess[str]
Command = Callable[..., Ran]


def run_python(*arguments: str, paths: tuple[str, ...] = (), **variables: str) -> Ran:
    """Run Python in a process of its own, with more folders to import from."""
    search = os.pathsep.join([*paths, *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **variables},
    )


def run_simulated(*arguments: str, **variables: str) -> Ran:
    """Run `recmas` beside the stand-ins."""
    module = ("-m", "recmas_runtime.cli.main")
    return run_python(*module, *arguments, paths=(str(SIMULATED),), **variables)


def data_of(ran: Ran) -> dict[str, Any]:
    """Return the `data` of a command that was run with `--json`."""
    body = json.loads(ran.stdout)
    assert body["ok"], ran.stdout
    data: dict[str, Any] = body["data"]
    return data
