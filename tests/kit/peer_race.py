"""What tests of the race beside other engines share; its files can be imported behind this one."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RACE = ROOT / "benchmarks/peers"
ENVIRONMENTS = ROOT / ".peers"
sys.path += [str(RACE), str(RACE / "adapters")]  # files that import each other by name

# Fewer positions than a tiny model has.
PROMPT = {"do": "prompt", "positions": 12}
STEPS = {"do": "steps", "rows": 2, "used": 12, "count": 3}
TEXT = {"do": "text", "used": 12, "count": 4}
