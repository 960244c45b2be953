"""Random cases that can be made again: each draws from the run's seed, its kind and its number.

Environment:
    RECMAS_FAULTS_SEED: Another seed than the usual one.
    RECMAS_FAULTS_CASE: One number: only that case of each test runs, and its folder is kept.
    RECMAS_FAULTS_TIMES: How many times the usual number of cases; 0.01 tries a few of each kind.
    RECMAS_FAULTS_LOG: A file that gets every failure as it comes.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

SEED: Final = int(os.environ.get("RECMAS_FAULTS_SEED", "14"))
ONLY: Final = os.environ.get("RECMAS_FAULTS_CASE")
LOG: Final = os.environ.get("RECMAS_FAULTS_LOG")
TIMES: Final = float(os.environ.get("RECMAS_FAULTS_TIMES", "1"))
NUM_PARTS: Final = 8
MAX_SHOWN: Final = 12

parts = pytest.mark.parametrize("part", range(NUM_PARTS))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case: what it draws from, and an empty folder of its own."""

    kind: str
    number: int
    random: random.Random
    folder: Path


# Returns what is wrong, with what was done and printed; nothing for a good end.
Try = Callable[[Case], Iterable[str]]


def try_cases(kind: str, count: int, part: int, attempt: Try) -> None:
    """Try the cases of one part of a kind, and fail with all that went wrong."""
    numbers = range(part, max(1, round(count * TIMES)), NUM_PARTS)
    if ONLY is not None:
        numbers = range(int(ONLY), int(ONLY) + 1) if int(ONLY) % NUM_PARTS == part else range(0)
    wrong: list[str] = []
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{number}-"))
        drawn = random.Random(f"{SEED}/{kind}/{number}")
        try:
            found = list(attempt(Case(kind=kind, number=number, random=drawn, folder=folder)))
        finally:
            if ONLY is None:
                shutil.rmtree(folder, ignore_errors=True)
        if found:
            place = f"\nits folder: {folder}" if ONLY is not None else ""
            wrong.append(f"{kind} case {number}, seed {SEED}: " + "\n  ".join(found) + place)
            if LOG is not None:
                with Path(LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
                    log.write(f"{wrong[-1]}\n")
    if wrong:
        again = f"RECMAS_FAULTS_SEED={SEED} RECMAS_FAULTS_CASE=N pytest -m faults -k {kind}"
        more = f"\n... and {len(wrong) - MAX_SHOWN} more" if len(wrong) > MAX_SHOWN else ""
        listed = "\n".join(wrong[:MAX_SHOWN])
        pytest.fail(
            f"{len(wrong)} of {len(numbers)} cases:\n{listed}{more}\nOne again: {again}",
            pytrace=False,
        )
