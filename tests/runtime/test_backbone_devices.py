"""A device for each backbone: what is asked for, what is there, what is said where it is not."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import recmas_runtime as rt
from recmas_runtime.cli.main import main
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.devices import DeviceChoice, joined, needs_gpu
from recmas_runtime.engines.onnx.session import onnx_runtime
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.manifest import MANIFEST_NAME
from recmas_runtime.running import open_engines
from recmas_runtime.running.open_engines import choose_device

HAS_CUDA = "CUDAExecutionProvider" in onnx_runtime().get_available_providers()
needs_no_cuda = pytest.mark.skipif(HAS_CUDA, reason="this ONNX Runtime has CUDA")


def placed_on(bundle: Path, device: str, to: Path, **changes: str) -> Path:
    """Return a copy of a bundle whose backbone was placed on a device."""
    shutil.copytree(bundle, to)
    manifest = json.loads((to / MANIFEST_NAME).read_text())
    manifest["backbones"]["one"] |= {"device": device, **changes}
    (to / MANIFEST_NAME).write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("auto", {"a": "cpu", "b": "auto"}),
        ("cuda", {"a": "cuda", "b": "cuda"}),
        ("b=cuda:1", {"a": "cpu", "b": "cuda:1"}),
        ("tensorrt, a=auto", {"a": "auto", "b": "tensorrt"}),
        ("a=cpu,b=cuda,b=cuda", {"a": "cpu", "b": "cuda"}),
    ],
)
def test_what_is_said_goes_before_what_the_bundle_says(text: str, devices: dict[str, str]) -> None:
    assert DeviceChoice.parse(text).of({"a": "cpu", "b": "auto"}) == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu", "unknown device 'gpu'.*cuda:1 is the second"),
        ("cuda:", "unknown device 'cuda:'"),
        ("a=cuda:123", "unknown device 'cuda:123'"),
        ("", "unknown device ''"),
        ("cpu,cuda", "two devices are given for all backbones: cpu and cuda"),
        ("a=cpu,a=cuda", "two devices are given for backbone 'a': cpu and cuda"),
        ("c=cpu", "a device is given for backbone 'c'; the bundle has a and b"),
    ],
)
def test_what_is_no_choice(text: str, message: str) -> None:
    with pytest.raises(RecmasError, match=f"RM504.*{message}"):
        DeviceChoice.parse(text).of({"a": "cpu", "b": "auto"})


def test_devices_in_a_line() -> None:
    assert joined({"a": "cpu", "b": "cpu"}) == "cpu"
    assert joined({"a": "cpu", "b": "cuda:1"}) == "a=cpu, b=cuda:1"
    assert [needs_gpu(text) for text in ("auto", "cpu", "a=cpu,cuda:1", "tensorrt")] == [
        *(False, False),
        *(True, True),
    ]


@needs_no_cuda
def test_a_backbone_placed_where_no_device_is(hand_bundle: Path, tmp_path: Path) -> None:
    bundle = placed_on(hand_bundle, "cuda:1", tmp_path / "placed")
    with pytest.raises(RecmasError) as caught:
        rt.load(bundle)
    (problem,) = caught.value.problems
    assert problem.code == "RM504"
    assert "device 'cuda:1' needs CUDAExecutionProvider; here are" in problem.message
    assert "--device cpu" in problem.hint
    system = rt.load(bundle, device="one=cpu", threads=1)
    assert (system.device, system.problems) == ("cpu", ())
    assert system.run("What is 7").answer == "h"


@needs_no_cuda
def test_the_command_line_takes_several(
    hand_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(hand_bundle), "What is 7", "--quiet"]
    assert main([*run, "--device", "cpu", "--device", "one=cpu"]) == 0
    assert capsys.readouterr().out == "h\n"
    assert main([*run, "--device", "one=cuda"]) == 4
    assert "needs CUDAExecutionProvider" in capsys.readouterr().err
    assert main([*run, "--device", "two=cpu"]) == 4
    assert "backbone 'two'; the bundle has one" in capsys.readouterr().err


def test_a_manifest_with_another_type_or_device(hand_bundle: Path, tmp_path: Path) -> None:
    other = placed_on(hand_bundle, "auto", tmp_path / "type", cache_dtype="float16")
    with pytest.raises(RecmasError, match=r"RM404.*keys and values in float16, the decoder has"):
        rt.load(other, device="cpu")
    unknown = placed_on(hand_bundle, "gpu", tmp_path / "device")
    with pytest.raises(RecmasError, match=r"RM404.*unknown device 'gpu'"):
        rt.load(unknown)


def test_a_precision_of_gpus_on_a_cpu_is_told(
    hand_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_engines, "resolve_device", lambda _: "cpu")
    bundle = open_bundle(placed_on(hand_bundle, "auto", tmp_path / "b", cache_dtype="bfloat16"))
    problems: list[Any] = []
    assert choose_device(bundle, "auto", problems) == "cpu"
    (warning,) = problems
    assert (warning.code, warning.severity) == ("RM553", "warning")
    assert "backbone 'one' is in bfloat16, for a GPU" in warning.message
    assert choose_device(bundle, "cpu", problems) == "cpu"
    assert len(problems) == 1


class TwoDevices:
    """Answers as the CUDA driver's library does on a machine with two GPUs."""

    def cuInit(self, _flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        ctypes.cast(version, ctypes.POINTER(ctypes.c_int))[0] = 13000
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = 2
        return 0


@pytest.mark.parametrize(
    ("index", "reason"),
    [(0, ""), (1, ""), (2, "there is no device cuda:2; here are cuda:0, cuda:1")],
)
def test_a_gpu_that_is_not_there(index: int, reason: str) -> None:
    assert open_engines._judge_driver(TwoDevices(), "13.0", index) == reason
