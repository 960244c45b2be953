from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_bundle(hand_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may spoil."""
    return Path(shutil.copytree(hand_bundle, tmp_path / "bundle"))
