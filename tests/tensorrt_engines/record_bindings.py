"""Record what published wheels say of the names that the stubs in `typings/` declare.

    python tests/tensorrt_engines/record_bindings.py FOLDER

FOLDER holds wheels for this Python, fetched with `pip download --no-deps`: tensorrt_cu13_bindings-*
and cuda_bindings-*. TensorRT's bindings load its libraries, gigabytes that no wheel here has, so
libraries with nothing but the nine entry points are compiled in their place; names and signatures
are in the bindings themselves. Writes bindings.json beside this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
TYPINGS = HERE.parents[1] / "typings"
RECORD = HERE / "bindings.json"
# import name -> stub file
STUBS = {
    "tensorrt": TYPINGS / "tensorrt.pyi",
    "cuda.bindings.runtime": TYPINGS / "cuda/bindings/runtime.pyi",
}

_ENTRY_POINTS = """
createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL
createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry
getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins
"""
_PRINT = """
import importlib, json, sys
from stub_names import published, stubbed
module = importlib.import_module(sys.argv[1])
names = list(stubbed(open(sys.argv[2]).read()))
print(json.dumps(published(module, names)))
"""


def record(wheel: Path) -> tuple[str, str, object]:
    """Return a wheel's import name, its version, and what it says."""
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        zipfile.ZipFile(wheel).extractall(folder)
        is_tensorrt = wheel.name.startswith("tensorrt")
        if is_tensorrt:
            _compile_libraries(folder)
        stub = "tensorrt" if is_tensorrt else "cuda.bindings.runtime"
        printed = subprocess.run(
            [
                sys.executable,
                "-c",
                _PRINT,
                "tensorrt_bindings" if is_tensorrt else stub,
                str(STUBS[stub]),
            ],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": scratch,
                "PYTHONPATH": os.pathsep.join([scratch, str(HERE), *sys.path[1:]]),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        return stub, version, json.loads(printed.stdout)


def _compile_libraries(folder: Path) -> None:
    binary = (folder / "tensorrt_bindings/tensorrt.so").read_bytes()
    source = folder / "entry_points.c"
    source.write_text("".join(f"void *{n}(void) {{ return 0; }}\n" for n in _ENTRY_POINTS.split()))
    for library in set(re.findall(rb"libnv(?:infer|infer_plugin|onnxparser)\.so\.\d+", binary)):
        target = str(folder / library.decode())
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, str(source)], check=True)


def main() -> None:
    """Record every wheel in the folder that is the argument."""
    found: dict[str, dict[str, object]] = {name: {} for name in STUBS}
    for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
        if wheel.name.startswith(("tensorrt_cu", "cuda_bindings-")):
            stub, version, names = record(wheel)
            found[stub][version] = names
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
