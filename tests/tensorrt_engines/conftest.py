from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.bundles import compile_system, each_backbone_exported_once, write_trio
from kit.files import MadeOnce
from recmas_export.build import build
from simulated_commands import run_simulated


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's state folder of these tests."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def portable_bundle(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without engines; not to be changed."""
    root = tmp_path_factory.mktemp("trio")
    spec, program = compile_system(write_trio(root))
    with each_backbone_exported_once(made_once):
        return build(program, spec=spec, out=root / "bundle").path


@pytest.fixture(scope="session")
def engine_bundle(portable_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the stand-ins; not to be changed."""
    root = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(portable_bundle, root)
    ran = run_simulated("engines", str(root), "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return root


@pytest.fixture
def own_bundle(engine_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with engines, to be changed."""
    return Path(shutil.copytree(engine_bundle, tmp_path / "bundle"))
