"""What faults are tried on; everything here is made in children, so that this process stays small.

A process that has run an engine or a training should not be forked any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.outcome import forked
from kit.files import MadeOnce

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker("faults")


@pytest.fixture(scope="session", autouse=True)
def quiet_machine() -> None:
    """Nothing here asks the network, and cases share the cores with their neighbours."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "0"}


def made_in_child(make: Callable[[], object]) -> None:
    outcome = forked(make, limit_s=300)
    assert outcome.status == 0, outcome.text


@pytest.fixture(scope="session")
def backbones(made_once: MadeOnce) -> Path:
    """A folder with tiny backbones of four families; only to be read."""

    def make(root: Path) -> None:
        from kit.models import write_tiny_backbone

        for seed, family in enumerate(("llama", "qwen3", "gemma3")):
            write_tiny_backbone(root / family, family, seed=seed)
        write_tiny_backbone(root / "qwen2", "qwen2", seed=1, hidden_size=48)

    return made_once("backbones of faults", lambda root: made_in_child(lambda: make(root)))


@pytest.fixture(scope="session")
def whole_bundle(made_once: MadeOnce) -> Path:
    """The bundle by hand, whole; only to be read."""

    def make(root: Path) -> None:
        from kit.hand_bundle import write_hand_bundle

        write_hand_bundle(root / "bundle")

    made = made_once("bundle of faults", lambda root: made_in_child(lambda: make(root)))
    return made / "bundle"
