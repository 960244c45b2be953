"""Backbones exported as a build does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest

from kit.engines import Exported, export_tiny
from kit.files import MadeOnce
from kit.fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def exported(made_once: MadeOnce) -> Callable[[str], Exported]:
    """Give the exported backbone of a case; each is exported once per run."""
    return cache(partial(export_tiny, made_once))
