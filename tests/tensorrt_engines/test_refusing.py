"""Machines without TensorRT: refused with a code and exit 4 before anything takes long."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit.bundles import write_trio
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.tensorrt.engine_cache import _architecture
from simulated_commands import run_python

# Hidden, so that the tests say the same on a machine that has them.
HIDDEN = "import sys; sys.modules['tensorrt'] = None\n"
RECMAS = f"{HIDDEN}from recmas_runtime.cli.main import main; sys.exit(main(sys.argv[1:]))"
RECMASC = f"{HIDDEN}from recmas_cli.main import main; main(sys.argv[1:])"


@pytest.mark.parametrize("how", [("--target", "tensorrt"), ("--set", "build.target=tensorrt")])
def test_a_build_is_refused_before_weights_are_loaded(how: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("build", str(write_trio(tmp_path)), "--out", str(out), "--json", *how)
    ran = run_python("-c", RECMASC, *asked)
    assert ran.returncode == 4
    (problem,) = json.loads(ran.stdout)["problems"]
    assert problem["code"] == "RM201"
    assert problem["message"].startswith("tensorrt is ")
    assert 'pip install "WHEEL[tensorrt]"' in problem["hint"]
    assert not out.exists()


def test_a_spec_for_tensorrt_can_be_checked_anywhere(tmp_path: Path) -> None:
    spec = write_trio(tmp_path)
    text = spec.read_text(encoding="utf-8")
    spec.write_text(text.replace("build: {", "build: {target: tensorrt, "), encoding="utf-8")
    ran = run_python("-c", RECMASC, "check", str(spec), "--json")
    assert ran.returncode == 0, ran.stdout
    assert {p["code"] for p in json.loads(ran.stdout)["problems"]} <= {"RM150", "RM151", "RM152"}


def test_engines_are_refused(portable_bundle: Path) -> None:
    ran = run_python("-c", RECMAS, "engines", str(portable_bundle), "--json")
    assert ran.returncode == 4
    assert json.loads(ran.stdout)["problems"][0]["code"] == "RM201"
    assert not (portable_bundle / "engines").exists()


def test_a_bundle_without_engines_says_nothing_about_them(portable_bundle: Path) -> None:
    ran = run_python("-c", RECMAS, "verify", str(portable_bundle), "--json")
    assert json.loads(ran.stdout)["problems"] == []
    strict = run_python(
        "-c", RECMAS, "verify", str(portable_bundle), "--device", "tensorrt", "--json"
    )
    assert strict.returncode == 4


def test_a_folder_of_the_same_name_is_no_tensorrt(tmp_path: Path) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here, and wins over a folder")
    (tmp_path / "tensorrt").mkdir()
    ran = run_python(
        "-c",
        "from recmas_runtime.engines.tensorrt.engine_cache import find_platform; find_platform()",
        paths=(str(tmp_path),),
    )
    assert "tensorrt is not installed" in ran.stderr


def test_without_a_gpu_the_driver_is_named() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    error, devices = runtime.cudaGetDeviceCount()
    if error == runtime.cudaError_t.cudaSuccess and devices:
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecmasError, match=r"RM504.*CUDA finds no GPU"):
        _architecture(runtime)
