"""The runtime is what its dependencies say: no compiler, no torch, and help without waiting."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import recmas_runtime

PACKAGE = Path(recmas_runtime.__file__).parent
ALLOWED = {
    "greenlet",
    "jinja2",
    "msgspec",
    "numpy",
    "onnxruntime",
    "recmas_runtime",
    "safetensors",
    "tokenizers",
}
# What files, or all files of a folder, may import that comes with an extra.
OPTIONAL = {
    "tensorrt": {"tensorrt", "cuda", "onnx"},
    "build_tensorrt": {"onnx"},
    "search": {"bm25s"},
    "tables": {"pyarrow"},
    "ray": {"fastapi", "ray"},
    "mcp": {"anyio", "mcp", "mcp_types", "pydantic", "uvicorn"},
    "http": {"fastapi", "pydantic", "starlette", "uvicorn"},
    "page": {"starlette"},
    "operation": {"fastapi", "opentelemetry", "pydantic", "uvicorn"},
    "metrics": {"prometheus_client"},
    "remote": {"openai"},
    "inspect_ai": {"inspect_ai"},
    "lm_eval": {"lm_eval"},
    "lm_eval_model": {"lm_eval", "tqdm"},
}
FOREIGN = (
    "torch",
    "transformers",
    "networkx",
    "pydantic",
    "onnx",
    "openai",
    "recmas_compiler",
    "recmas_export",
)


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_everything_imports_nothing_foreign() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("[a-z]*.py")
        if path.stem != "launcher"  # a program of its own
        and not OPTIONAL.get(path.stem, OPTIONAL.get(path.parent.name))
    ]
    loaded = modules_after("\n".join(f"import {name}" for name in names))
    assert loaded.isdisjoint(FOREIGN)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(
        "import contextlib\n"
        "from recmas_runtime.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments!r})"
    )
    assert loaded.isdisjoint({"numpy", "onnxruntime", "tokenizers", "jinja2"})


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_modules_import_only_what_the_runtime_depends_on(path: Path) -> None:
    extra = OPTIONAL.get(path.stem, OPTIONAL.get(path.parent.name, set()))
    assert imports_of(path) <= ALLOWED | extra | set(sys.stdlib_module_names)


WATCH_IMPORT = """
import os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1", "imported with telemetry on"

sys.meta_path.insert(0, Watch())
import recmas_runtime.running.system, recmas_runtime.checking.verify
from recmas_runtime.engines.onnx.session import onnx_runtime
onnx_runtime()
"""


def test_telemetry_is_off_before_onnx_runtime_is_imported() -> None:
    assert "onnxruntime" in modules_after(WATCH_IMPORT)


def test_without_an_extra_users_are_told_its_name(hand_bundle: Path) -> None:
    for command, package in (("mcp", "mcp_types"),):
        hidden = f"import sys; sys.modules['{package}'] = None\n"
        code = (
            f"from recmas_runtime.cli.main import main\nsys.exit(main({[command]} + sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", hidden + code, str(hand_bundle)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert done.returncode == 4
        assert f"error[RM201]: the Python package `{package}` is not installed" in done.stderr
        assert f'pip install "WHEEL[{command}]"' in done.stderr


def test_without_onnx_runtime_users_are_told_how_to_get_it(hand_bundle: Path) -> None:
    hidden = (
        "import sys; sys.modules['onnxruntime'] = None\nfrom recmas_runtime.cli.main import main\n"
    )
    for arguments in (["run", str(hand_bundle), "7"], ["verify", str(hand_bundle)], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-c", f"{hidden}sys.exit(main({arguments!r}))"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert done.returncode == 4
        assert "error[RM201]: onnxruntime is not installed" in done.stderr
        assert 'pip install "WHEEL[cpu]"' in done.stderr
