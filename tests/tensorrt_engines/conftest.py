from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from simulated_commands import run_simulated
from tiny_bundle import build_bundle


@pytest.fixture(scope="session")
def portable_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without engines; not to be changed."""
    return build_bundle(tmp_path_factory.mktemp("trio"))


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
