"""What every group of tests shares; what needs torch is imported on demand."""

from __future__ import annotations

import difflib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kit.files import MadeOnce

if TYPE_CHECKING:
    from kit.bundles import BuildTiny

# No test takes what another one has made, or touches the user's own: a check that is broken on
# purpose must see engines. Tests of the cache itself name a folder.
os.environ["RECMAS_CACHE"] = "off"

GOLDEN = Path(__file__).parent / "golden"
SLOWEST_FIRST = (
    "smollm2",
    "training",
    "system",
    "export",
    "released",
    "with_torch",
    "bench_command",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="Write golden files instead of comparing."
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow groups first, so that no process is left alone with one of them at the end."""
    places = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))


@pytest.fixture(scope="session", autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Take interrupts even where this process, or a child, would inherit that they are ignored.

    Shells start what runs in the background so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a text with tests/golden/<test file>/<test name><suffix>.txt."""

    def compare(text: str, suffix: str = "") -> None:
        # A parameter becomes part of the name: test_passes[diamond] -> test_passes-diamond
        name = request.node.name.replace("[", "-").rstrip("]") + suffix
        path = GOLDEN / request.path.stem / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"no golden file {path}; write it with --update-golden"
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            diff = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), str(path), "this run", lineterm=""
            )
            pytest.fail("\n".join(diff) or "texts differ only in line ends", pytrace=False)

    return compare


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Folders that all processes of this test run share."""
    return MadeOnce(tmp_path_factory)


@pytest.fixture(scope="session")
def hand_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two agents and two rounds that answers a digit with a letter; only to be read."""
    from kit.hand_bundle import write_hand_bundle

    return write_hand_bundle(tmp_path_factory.mktemp("by-hand") / "by-hand")


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny backbones `llama`, `qwen3` and `gemma3`; only to be read."""
    from kit.models import write_tiny_backbone

    root = tmp_path_factory.mktemp("families")
    for number, family in enumerate(("llama", "qwen3", "gemma3")):
        write_tiny_backbone(root / family, family, seed=number)
    return root


@pytest.fixture(scope="session")
def build_tiny(
    families: Path, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory
) -> BuildTiny:
    """Build a YAML text whose backbones are in `families`, or in another folder; once per text."""
    from kit.bundles import tiny_builder

    return tiny_builder(families, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="session")
def project(
    build_tiny: BuildTiny, families: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a spec of three agents and three rounds, its tiny backbone and its bundle."""
    from kit.specs import SEQUENTIAL

    root = tmp_path_factory.mktemp("project")
    shutil.copytree(families / "llama", root / "llama")
    (root / "spec.yaml").write_text(SEQUENTIAL)
    build_tiny(SEQUENTIAL, base_dir=root, out=root / "bundle")
    return root
