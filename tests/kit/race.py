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
QUESTIONS = (
    {"id": "0", "question": "What are 3 and 4 {together}?", "answer": "7"},
    {"id": "1", "question": "How many legs have two cats?", "answer": "8"},
    {"id": "2", "question": "What is left of 9 apples, if 4 are eaten?", "answer": "5"},
)

Run = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True)
class Tiny:
    """Bundles of a tiny model alone and of the team on it, and its weights."""

    single: Path
    team: Path
    weights: Path
