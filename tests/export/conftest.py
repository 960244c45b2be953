"""Backbones exported as a build does it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest

from backbones_page import FIGURES
from kit.engines import Exported, export_tiny
from kit.files import MadeOnce
from kit.fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def exported(made_once: MadeOnce) -> Callable[[str], Exported]:
    """Give the exported backbone of a case; each is exported once per run."""
    return cache(partial(export_tiny, made_once))


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[dict[str, float]]:
    """Take the largest difference of each row of the zoo; a run of all of them keeps what it found.

    To one digit, as more of them depend on the machine.
    """
    found: dict[str, float] = {}
    yield found
    if "families" in request.config.option.markexpr.replace("not families", ""):
        kept = json.loads(FIGURES.read_bytes()) if FIGURES.exists() else {}
        kept |= {name: float(f"{figure:.0e}") for name, figure in found.items()}
        FIGURES.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n")
