"""Tiny backbones, loaded once, and tiny systems to train, each test in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.fixtures import exports_once, one_thread, tiny
from kit.models import write_tiny_backbone
from kit.training import write_case

__all__ = ["exports_once", "one_thread", "tiny"]


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two tiny backbones of different widths."""
    root = tmp_path_factory.mktemp("backbones")
    write_tiny_backbone(root / "llama", "llama", seed=0)
    write_tiny_backbone(root / "qwen2", "qwen2", seed=1, hidden_size=48)
    return root


@pytest.fixture
def case(backbone_folders: Path, tmp_path: Path) -> Path:
    """Return a spec with data and backbones beside it."""
    for name in ("llama", "qwen2"):
        (tmp_path / name).symlink_to(backbone_folders / name)
    return write_case(tmp_path)
