"""Trainings and evaluations of tiny systems with trackers."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.fixtures import exports_once, one_thread
from kit.models import write_tiny_backbone
from kit.training import write_case

__all__ = ["exports_once", "one_thread"]


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec to train, with its data and backbones; commands run beside it."""
    write_tiny_backbone(tmp_path / "llama", "llama", seed=0)
    write_tiny_backbone(tmp_path / "qwen2", "qwen2", seed=1, hidden_size=48)
    monkeypatch.chdir(tmp_path)
    return write_case(tmp_path)
