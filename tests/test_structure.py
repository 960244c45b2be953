"""Rules about the source itself: imports point one way, files stay small, nothing is global."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import recmas_compiler
import recmas_runtime

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("recmas_compiler", "runtime/recmas_runtime", "export/recmas_export")
    for path in (ROOT / folder).rglob("*.py")
)
BENCH = ROOT / "tests/bench"
SCRIPTS = sorted(p.stem for p in BENCH.glob("*.py") if "def main(" in p.read_text(encoding="utf-8"))
MAX_LINES = 400

# part of the source -> what it must not import; parts are prefixes of module names
FORBIDDEN = {
    "recmas_runtime": ("recmas_compiler", "recmas_export"),
    "recmas_compiler.spec": (
        "recmas_compiler.ir",
        "recmas_compiler.passes",
        "recmas_compiler.links",
        "recmas_compiler.lowering",
        "recmas_compiler.training",
    ),
    "recmas_compiler.backbones": (
        "recmas_compiler.passes",
        "recmas_compiler.links",
        "recmas_compiler.lowering",
    ),
    "recmas_compiler.ir": (
        "recmas_compiler.passes",
        "recmas_compiler.links",
        "recmas_compiler.lowering",
        "recmas_compiler.backbones.torch_model",
    ),
    "recmas_compiler.passes": ("recmas_compiler.links", "recmas_compiler.lowering"),
    "recmas_compiler.links": (
        "recmas_compiler.passes",
        "recmas_compiler.lowering",
        "recmas_compiler.training",
    ),
    "recmas_compiler.lowering": ("recmas_compiler.training",),
    "recmas_compiler.evaluation": (
        "recmas_compiler.api",
        "recmas_compiler.backbones",
        "recmas_compiler.ir",
        "recmas_compiler.links",
        "recmas_compiler.lowering",
        "recmas_compiler.passes",
    ),
    "recmas_export": ("recmas_compiler.commands", "recmas_compiler.cli", "recmas_compiler.api"),
}
# Only the command line and the Python door may reach up to export.
MAY_IMPORT_EXPORT = {
    "recmas_compiler.api",
    "recmas_compiler.bench.command",
    "recmas_compiler.commands",
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    start = next(i for i, part in enumerate(parts) if part.startswith("recmas_"))
    return ".".join(parts[start:])


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    for part, forbidden in FORBIDDEN.items():
        if name.startswith(part):
            wrong = [i for i in imports_of(path) if i.startswith(forbidden)]
            assert not wrong, f"{name} imports {wrong}"
    if name.startswith("recmas_compiler") and name not in MAY_IMPORT_EXPORT:
        assert not [i for i in imports_of(path) if i.startswith("recmas_export")]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_small_and_ascii(path: Path) -> None:
    text = path.read_bytes().decode("ascii")
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("command", ["check", "explain", "plan", "graph", "ir"])
def test_looking_at_a_spec_loads_no_torch(command: str) -> None:
    code = (
        "import sys, contextlib\n"
        "from recmas_compiler.cli import main\n"
        f"with contextlib.suppress(SystemExit): main([{command!r}, 'specs/sequential.yaml'])\n"
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout
    assert ran.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_start(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {name}")


def test_public_doors() -> None:
    assert recmas_compiler.__all__ == [
        "Problem",
        "Program",
        "RecmasError",
        "Spec",
        "build",
        "compile",
        "load_spec",
        "parse_spec",
        "to_torch",
    ]
    assert recmas_runtime.__all__ == [
        "Answer",
        "AnswerStream",
        "Problem",
        "RecmasError",
        "Record",
        "SamplingPlan",
        "System",
        "Timing",
        "Usage",
        "load",
    ]
    for package in (recmas_compiler, recmas_runtime):
        for name in package.__all__:
            assert getattr(package, name)
