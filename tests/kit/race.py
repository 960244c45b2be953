"""What tests of the race between frameworks share; its files can be imported behind this one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RACE = ROOT / "benchmarks/frameworks"
ENVIRONMENTS = ROOT / ".frameworks"
sys.path.append(str(RACE))  # its files import each other by name

TOKENS = 12
QUESTION = {"id": "0", "question": "What are 3 and 4 {together}?", "answer": "7"}

Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Tiny:
    """Bundles of a tiny model alone and of the team on it, and its weights."""

    single: Path
    team: Path
    weights: Path
