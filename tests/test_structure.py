"""Rules about the source itself: imports point one way, files stay small, nothing is global."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import recmas_compiler
import recmas_runtime

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("recmas_compiler", "runtime/recmas_runtime", "export")
    for path in (ROOT / folder).rglob("*.py")
)
BENCH = ROOT / "benchmarks"
SCRIPTS = sorted(p for p in BENCH.rglob("*.py") if "def main(" in p.read_text(encoding="utf-8"))
MAX_LINES = 600
MAX_FILES = 14  # of a folder, its `__init__.py` included
# One file each by nature: a pass, a check, a tool, a command.
MAY_HOLD_MORE = {
    "recmas_compiler.passes",
    "recmas_export.passes",
    "recmas_runtime.tools",
    "recmas_cli",
}

# In the order of the data's way: a package imports from itself and from packages above it here.
# A package stands for the files right in its folder; the doors of a distribution come last.
LAYERS = (
    "recmas_runtime.core",
    "recmas_runtime.formats",
    "recmas_runtime.cache",
    "recmas_runtime.tools.sandbox",
    "recmas_runtime.tools",
    "recmas_runtime.prompts",
    "recmas_runtime.engines",
    "recmas_runtime.engines.onnx",
    "recmas_runtime.engines.tensorrt",
    "recmas_runtime.remote",
    "recmas_runtime.scheduling",
    "recmas_runtime.sequences",
    "recmas_runtime.running",
    "recmas_runtime.serve",
    "recmas_runtime.serve.page",
    "recmas_runtime.serve.http",
    "recmas_runtime.serve.operation",
    "recmas_runtime.serve.ray",
    "recmas_runtime.serve.packaging",
    "recmas_runtime.checking",
    "recmas_runtime.bench",
    "recmas_runtime.harness",
    "recmas_runtime.cli",
    "recmas_runtime",
    "recmas_compiler.spec.document",
    "recmas_compiler.spec.schema",
    "recmas_compiler.spec.patterns",
    "recmas_compiler.spec.checks",
    "recmas_compiler.spec",
    "recmas_compiler.importers",
    "recmas_compiler.importers.readers",
    "recmas_compiler.backbones.config",
    "recmas_compiler.backbones.loaded",
    "recmas_compiler.backbones.fetching",
    "recmas_compiler.backbones.gguf_files",
    "recmas_compiler.backbones",
    "recmas_compiler.links",
    "recmas_compiler.ir",
    "recmas_compiler.passes",
    "recmas_compiler.analysis",
    "recmas_compiler.lowering",
    "recmas_compiler.lowering.training_graph",
    "recmas_compiler.released",
    "recmas_compiler.trackers",
    "recmas_compiler.training.loop",
    "recmas_compiler.training.data",
    "recmas_compiler.training.tasks",
    "recmas_compiler.training",
    "recmas_compiler.evaluation.data",
    "recmas_compiler.evaluation.checks",
    "recmas_compiler.evaluation",
    "recmas_compiler.text_gradients",
    "recmas_compiler.bench",
    "recmas_compiler",
    "recmas_export.trace",
    "recmas_export.passes",
    "recmas_export.bundle",
    "recmas_export.cache",
    "recmas_export",
    "recmas_cli",
)


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    start = next(i for i, part in enumerate(parts) if part.startswith("recmas_"))
    return ".".join(parts[start:]).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}
PACKAGES = {name for name, path in MODULES.items() if path.stem == "__init__"}


def package_of(module: str) -> str:
    return module if module in PACKAGES else module.rpartition(".")[0]


def imports_of(path: Path) -> set[str]:
    """Return the modules of recmas that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {name for name in found if name in MODULES} - {module_name(path)}


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/glossary.md"])
def test_pages_name_files_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").split("## How to add")[0]
    roots = ("recmas_compiler/", "runtime/", "export/", "tests/", "docs/")
    named = re.findall(rf"`((?:{'|'.join(roots)})[\w./-]*)`", text)
    missing = [name for name in named if "<" not in name and not (ROOT / name).exists()]
    assert not missing


def test_every_package_has_a_layer() -> None:
    with_files = {package_of(name) for name in MODULES if name not in PACKAGES}
    with_files |= {name for name in PACKAGES if imports_of(MODULES[name])}
    assert with_files <= set(LAYERS)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    rank = {package: place for place, package in enumerate(LAYERS)}
    own = rank.get(package_of(name), -1)
    upward = {
        (name, found)
        for found in imports_of(path)
        if package_of(found) != package_of(name) and rank[package_of(found)] > own
    }
    assert not upward


def test_no_import_cycle() -> None:
    arrows = {name: sorted(imports_of(path)) for name, path in MODULES.items()}
    done: set[str] = set()
    for start in sorted(arrows):
        trail: list[str] = []
        _walk(start, arrows, trail, done)


def _walk(name: str, arrows: dict[str, list[str]], trail: list[str], done: set[str]) -> None:
    if name in done:
        return
    assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
    trail.append(name)
    for found in arrows[name]:
        _walk(found, arrows, trail, done)
    trail.pop()
    done.add(name)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_small_and_ascii(path: Path) -> None:
    text = path.read_bytes().decode("ascii")
    assert len(text.splitlines()) <= MAX_LINES


def test_folders_are_small() -> None:
    held = Counter(package_of(name) for name in MODULES)
    assert not {k: n for k, n in held.items() if n > MAX_FILES and k not in MAY_HOLD_MORE}


def test_looking_at_a_spec_loads_no_torch() -> None:
    code = (
        "import sys, contextlib\n"
        "from recmas_cli.main import main\n"
        "for command in ('check', 'explain', 'plan', 'graph', 'ir'):\n"
        "    print('command', command, flush=True)\n"
        "    with contextlib.suppress(SystemExit): main([command, 'specs/sequential.yaml'])\n"
        "    loaded = [m for m in ('torch', 'transformers', 'onnx') if m in sys.modules]\n"
        "    assert not loaded, (command, loaded)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    _, *shown = ran.stdout.split("command ")
    assert len(shown) == 5
    assert all(len(part.splitlines()) > 1 for part in shown), "every command prints something"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(sys, "argv", [path.stem, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(path.stem).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.stem}")


def test_public_doors() -> None:
    assert recmas_compiler.__all__ == [
        "Problem",
        "Program",
        "RecmasError",
        "Spec",
        "build",
        "compile",
        "evaluate",
        "load_spec",
        "parse_spec",
        "to_torch",
        "train",
    ]
    assert recmas_runtime.__all__ == [
        "Answer",
        "AnswerStream",
        "EarlierTurn",
        "FailedRecord",
        "Problem",
        "RecmasError",
        "Record",
        "SamplingPlan",
        "System",
        "Timing",
        "Trace",
        "TraceWriter",
        "Usage",
        "load",
    ]
    for package in (recmas_compiler, recmas_runtime):
        for name in package.__all__:
            assert getattr(package, name)


def test_the_page_on_python_has_every_name() -> None:
    """And says of none what is not there."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    _, compiler, runtime = page.split("\n## ")
    for package, part in ((recmas_compiler, compiler), (recmas_runtime, runtime)):
        rows = re.findall(r"^\| (`\w+(?:`, `\w+)*)[`(]", part, re.MULTILINE)
        assert sorted(re.findall(r"\w+", ", ".join(rows))) == list(package.__all__)
