"""Which device a bundle runs on, and what to say where it is not the one that was hoped for.

CUDA goes through ONNX Runtime's CUDA provider. It has not been tried on hardware yet; what can be
done without it is tested on the CPU.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, Final

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.engines.onnx.session import Device, onnx_runtime, resolve_device
from recmas_runtime.formats.tolerances import TOLERANCES
from recmas_runtime.running.parity import measure_probe

_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def choose_provider(
    device: str, probe: Path, *, threads: int | None = None
) -> tuple[Device, tuple[Problem, ...]]:
    """Return the device to run on, and a warning where `auto` could not take CUDA.

    CUDA is taken where ONNX Runtime offers it, it starts, and the known-answer probe comes out
    right there.

    Args:
        device: `auto`, `cpu` or `cuda`.
        probe: The bundle's known-answer probe.
        threads: Threads within an operator; None takes the physical cores.

    Raises:
        RecmasError: RM504 if the device is unknown or cannot be used.
    """
    where = resolve_device(device)
    if where == "cpu":
        return where, ()
    try:
        _demand_cuda(probe, threads)
    except RecmasError as error:
        if device != "auto":
            raise
        warning = Problem(
            code="RM504",
            message=f"runs on the CPU, for CUDA cannot be used: {error.problems[0].message}",
            hint="Mend that, or say --device cpu to run there without this warning.",
            severity="warning",
        )
        return "cpu", (warning,)
    return where, ()


def _demand_cuda(probe: Path, threads: int | None) -> None:
    reason = why_no_cuda(_DRIVER, str(getattr(onnx_runtime(), "cuda_version", "") or ""))
    if reason:
        raise fail(
            "RM504",
            reason,
            hint="Install a newer NVIDIA driver, or use --device cpu.",
        )
    difference = measure_probe(probe, threads=threads, device="cuda")
    if not difference <= TOLERANCES["probe_absolute"]:
        raise fail(
            "RM504",
            f"the known-answer probe is off by {difference:.2e} on CUDA, "
            f"allowed is {TOLERANCES['probe_absolute']:.0e}",
            hint="Upgrade onnxruntime-gpu, or use --device cpu.",
        )


def why_no_cuda(driver: str, needed: str) -> str:
    """Return what is wrong with the NVIDIA driver, empty if nothing is.

    Args:
        driver: The driver's library.
        needed: The CUDA version that ONNX Runtime was built with, such as `13.0`; empty if unknown.
    """
    try:
        library = ctypes.CDLL(driver)
    except OSError:
        return f"there is no NVIDIA driver here ({driver} cannot be loaded)"
    return _judge_driver(library, needed)


def _judge_driver(library: Any, needed: str) -> str:
    """Ask the CUDA driver API whether it starts, and for which CUDA it was made."""
    status = library.cuInit(0)
    if status != 0:
        return f"the NVIDIA driver does not start (cuInit returns {status})"
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    has, has_minor = version.value // 1000, version.value % 1000 // 10
    if needed and has < int(needed.split(".")[0]):
        return (
            f"the NVIDIA driver is too old: it runs CUDA {has}.{has_minor}, and this ONNX Runtime "
            f"was built with CUDA {needed}"
        )
    return ""
