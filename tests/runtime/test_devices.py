"""What is said where CUDA cannot be used; none of it needs CUDA."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.onnx.session import NO_GRAPH, make_session, onnx_runtime, run_options
from recmas_runtime.running import open_engines as devices
from recmas_runtime.running.open_engines import choose_provider, why_no_cuda

HAS_CUDA = "CUDAExecutionProvider" in onnx_runtime().get_available_providers()


def test_the_cpu_needs_no_probe(tmp_path: Path) -> None:
    assert choose_provider("cpu", tmp_path / "nothing.onnx") == ("cpu", ())


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_package_without_cuda(tmp_path: Path) -> None:
    assert choose_provider("auto", tmp_path / "nothing.onnx") == ("cpu", ())
    with pytest.raises(RecmasError, match=r"RM504.*needs CUDAExecutionProvider"):
        choose_provider("cuda", tmp_path / "nothing.onnx")


@pytest.mark.skipif(not why_no_cuda("libcuda.so.1", ""), reason="this machine has a driver")
def test_a_machine_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package for CUDA on a machine without a GPU: `auto` runs, and says where and why."""
    monkeypatch.setattr(devices, "resolve_device", lambda device: "cuda")
    where, (warning,) = choose_provider("auto", tmp_path / "nothing.onnx")
    assert where == "cpu"
    assert (warning.code, warning.severity) == ("RM504", "warning")
    assert "there is no NVIDIA driver here (libcuda.so.1 cannot be loaded)" in warning.message
    with pytest.raises(RecmasError, match=r"RM504.*there is no NVIDIA driver"):
        choose_provider("cuda", tmp_path / "nothing.onnx")


class Driver:
    """Answers as the CUDA driver's library does."""

    def __init__(self, status: int, version: int) -> None:
        self.status = status
        self.version = version

    def cuInit(self, _flags: int) -> int:  # the driver's own name
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = self.version
        return 0


@pytest.mark.parametrize(
    ("status", "version", "needed", "reason"),
    [
        (0, 13000, "13.0", ""),
        (0, 13010, "12.8", ""),
        (0, 12040, "", ""),
        (0, 12040, "13.0", "it runs CUDA 12.4, and this ONNX Runtime was built with CUDA 13.0"),
        (100, 0, "13.0", "does not start (cuInit returns 100)"),
    ],
)
def test_what_a_driver_says(status: int, version: int, needed: str, reason: str) -> None:
    found = devices._judge_driver(Driver(status, version), needed)
    assert (reason in found) if reason else (found == "")


@pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")
def test_a_provider_that_does_not_start_is_no_cpu(hand_bundle: Path) -> None:
    """ONNX Runtime drops a provider with a warning and runs on; recmas does not."""
    path = hand_bundle / "backbones/one/head.onnx"
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(RecmasError, match=r"RM504.*CUDAExecutionProvider did not start"),
    ):
        make_session(path, device="cuda", cuda_graphs=True)


def test_runs_are_told_their_graph() -> None:
    assert run_options(NO_GRAPH).get_run_config_entry("gpu_graph_id") == "-1"
    assert run_options(7).get_run_config_entry("gpu_graph_id") == "7"
