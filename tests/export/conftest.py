from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from kit.engines import Exported, export_tiny


@pytest.fixture(scope="session", autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Give the exported backbone of a case; each is exported once per run."""
    root = tmp_path_factory.mktemp("exported")
    return cache(lambda name: export_tiny(root, name))
