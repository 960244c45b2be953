"""The one place that imports ONNX Runtime and opens sessions with it."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_runtime.core.errors import fail, how_to_install, is_out_of_memory
from recmas_runtime.core.terminal import signals_held
from recmas_runtime.core.text import first_line
from recmas_runtime.engines.interface import FREE_MEMORY, OutOfMemoryError
from recmas_runtime.formats.precisions import AUTO, device_named

if TYPE_CHECKING:
    import onnxruntime

# A device that ONNX Runtime runs on: `cpu`, `cuda`, or `cuda:1` for the second one.
Device = str

# By the kind of a device.
PROVIDERS: Final[dict[str, tuple[str, ...]]] = {
    "cpu": ("CPUExecutionProvider",),
    # What CUDA has no kernel for falls back to the CPU.
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
# Documented options of the CUDA provider. Products in TF32 would keep 10 bits of what float32 says.
_CUDA_OPTIONS: Final = {"use_tf32": "0"}
_FATAL_ONLY: Final = 4  # what is raised need not be printed as well, in colours and unfiltered
# Threads that wait for the next operator turn in a loop. Sessions take turns on the same cores, so
# those of a run that has ended must not: they would hold a core that the next session needs.
_ALWAYS: Final = {"session.force_spinning_stop": "1"}
# x64 processors without VNNI add products of 8-bit integers in 16 bits, which is too few for
# weights that use all 8. With this they take a slower way that is right; so would all others.
_WIDE_SUMS: Final = {"session.x64quantprecision": "1"}
_VNNI: Final = frozenset({"avx512_vnni", "avx_vnni"})
# What a run's graph id is if it must be neither captured nor replayed.
NO_GRAPH: Final = -1


def onnx_runtime() -> Any:
    """Import ONNX Runtime with its telemetry off.

    Raises:
        RecmasError: RM201 if it is not installed.
    """
    # Since 1.29 it reports usage unless told not to, and it decides when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        with signals_held():
            import onnxruntime
    except ImportError:
        raise fail(
            "RM201",
            "onnxruntime is not installed",
            hint=f"{how_to_install('cpu')} For CUDA take `gpu` in its place.",
        ) from None
    return onnxruntime


def resolve_device(device: str) -> Device:
    """Return the device to run on; `auto` takes CUDA where ONNX Runtime offers it.

    Raises:
        RecmasError: RM504 if the device is unknown or not available here.
    """
    available = onnx_runtime().get_available_providers()
    if device == AUTO:
        return "cuda" if PROVIDERS["cuda"][0] in available else "cpu"
    kind, index = device_named(device)
    provider = PROVIDERS[kind][0]
    if provider not in available:
        raise fail(
            "RM504",
            f"device {device!r} needs {provider}; here are {', '.join(available)}",
            hint="Install onnxruntime-gpu with a CUDA driver, or use --device cpu.",
        )
    return kind if index == 0 else device


def provider_of(device: Device) -> str:
    """Return the provider that runs operators on a device."""
    return PROVIDERS[device_named(device).kind][0]


def make_session(
    path: Path,
    *,
    threads: int | None = None,
    device: Device = "cpu",
    options: Mapping[str, str] | None = None,
    profile: Path | None = None,
    cuda_graphs: bool = False,
    optimized: bytes | None = None,
    write_optimized: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Open a graph.

    Args:
        threads: Threads within an operator; None takes the physical cores.
        cuda_graphs: Let runs be captured into CUDA graphs, see `run_options`; only runs with bound
            buffers are then possible. Devices without them ignore it.
        profile: Start of the name of a file that every kernel is recorded in; None for no record.
        optimized: What ONNX Runtime has made of the graph at `path` before, to open in its place.
        write_optimized: Where it is to write what it makes of the graph; None for nowhere.

    Raises:
        RecmasError: RM504 if the device cannot be used, RM507 if the graph is refused.
    """
    ort = onnx_runtime()
    kind, index = device_named(device)
    if kind == "cuda":
        _load_cuda_libraries()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads if threads is not None else physical_cores()
    settings.inter_op_num_threads = 1  # plans are sequences: there is nothing to overlap
    settings.log_severity_level = _FATAL_ONLY
    for name, value in {**lasting_options(), **(options or {})}.items():
        settings.add_session_config_entry(name, value)
    if optimized is not None:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if write_optimized is not None:
        settings.optimized_model_filepath = str(write_optimized)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    first, *others = PROVIDERS[kind]
    cuda_options = {
        **_CUDA_OPTIONS,
        "enable_cuda_graph": str(int(cuda_graphs)),
        "device_id": str(index),
    }
    try:
        session = ort.InferenceSession(
            str(path) if optimized is None else optimized,
            settings,
            providers=[first] if kind == "cpu" else [(first, cuda_options), *others],
            # It would print, and go on without the provider that was asked for.
            enable_fallback=0,
        )
    # ONNX Runtime raises a dozen unrelated classes for a graph it will not run.
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(f"{path.name} cannot be loaded", FREE_MEMORY) from error
        raise fail(
            "RM507",
            f"ONNX Runtime {ort.__version__} refuses the graph: {error}",
            file=str(path),
            hint="Run `recmas verify` on the bundle; if it passes, upgrade onnxruntime.",
        ) from error
    # A provider that cannot start is dropped with a log line; that must not go unnoticed.
    if first not in session.get_providers():
        raise fail(
            "RM504",
            f"{first} did not start; only {', '.join(session.get_providers())} did",
            hint="Check the CUDA driver and libraries, or use --device cpu.",
        )
    return session


def lasting_options() -> dict[str, str]:
    """Return the options that every session here has."""
    return {**_ALWAYS, **({} if adds_in_32_bits() else _WIDE_SUMS)}


@functools.cache
def _load_cuda_libraries() -> None:
    """Load CUDA from NVIDIA's wheels, where they are what is installed; once, for it takes time."""
    # It prints what it does not find, and stdout is for data.
    with contextlib.redirect_stdout(sys.stderr):
        onnx_runtime().preload_dlls()


def call_onnx(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a session, or what belongs to one, during a run.

    Raises:
        OutOfMemoryError: If memory runs out.
        RecmasError: RM507 for whatever else ONNX Runtime raises.
    """
    try:
        return call(*arguments)
    # A dozen unrelated classes, as for graphs that it refuses.
    except Exception as error:
        message = f"ONNX Runtime {onnx_runtime().__version__} fails: {first_line(error)}"
        if is_out_of_memory(error):
            raise OutOfMemoryError(message) from error
        raise fail(
            "RM507",
            message,
            hint="Run `recmas verify` on the bundle; if it passes, upgrade onnxruntime.",
        ) from error


def run_options(graph_id: int) -> Any:
    """Return options of a run: the CUDA graph that it is captured in and replayed from.

    A graph's id is any positive number, one per set of buffers; `NO_GRAPH` for none.
    """
    options = onnx_runtime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


@functools.cache
def adds_in_32_bits(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of 8-bit integers are added in 32 bits, as far as the system tells."""
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return True
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _VNNI.isdisjoint(flags.split())


def physical_cores() -> int:
    """Return how many physical cores this process may use, at least 1.

    Hyper-threads share one floating-point unit, so more threads than cores only slow each other
    down. A container's CPU quota counts too.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    logical = len(allowed) if allowed is not None else os.cpu_count() or 1
    cores = _cores_of(Path("/sys/devices/system/cpu"), allowed or set()) or logical
    quota = _quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, int(min(cores, logical, quota)))


def _cores_of(folder: Path, cpus: set[int]) -> int:
    """Count distinct cores behind logical `cpus`; 0 where the kernel does not tell."""
    try:
        siblings = {
            (folder / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in cpus
        }
    except OSError:
        return 0
    return len(siblings)


def _quota(cpu_max: Path) -> float:
    """Return the container's CPU quota in CPUs; infinite where there is none."""
    try:
        quota, period = cpu_max.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such file, or `max`
        return math.inf
