"""Fixtures of the test groups that compute with torch; a group's conftest imports what it needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kit.bundles import each_backbone_exported_once
from kit.files import MadeOnce
from kit.models import LoadTiny, load_tiny
from recmas_compiler.backbones.torch_model import TorchBackbone


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on many threads, and other tests may run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def exports_once(made_once: MadeOnce) -> Iterator[None]:
    """Builds in this process export each backbone once per test run."""
    with each_backbone_exported_once(made_once):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadTiny:
    """Return the loaded tiny backbone of a family; equal arguments give the same object."""
    made: dict[str, TorchBackbone] = {}

    def load(family: str, *, seed: int = 0, **dims: object) -> TorchBackbone:
        key = f"{family}-{seed}-{sorted(dims.items())}"
        if key not in made:
            made[key] = load_tiny(tmp_path_factory.mktemp(family), family, seed=seed, **dims)
        return made[key]

    return load
