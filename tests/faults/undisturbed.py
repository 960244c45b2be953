"""Jobs as they go when nothing happens to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from faults.jobs import Job

# A job for every case in turn.
TURNS: Final = ("run", "train", "eval", "build", "run", "train over", "eval", "build over")


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """A job, what it gives when nothing happens, what was there before it.

    Attributes:
        num_bytes: What all files take that it wrote.
    """

    job: Job
    whole: Any
    before: Any
    writes: int
    seconds: float
    num_bytes: int
