"""How much of the gap between the question alone and everything in one prompt messages close.

    python benchmarks/gap.py FOLDER [FOLDER ...]

FOLDER holds what `recmasc eval --score likelihood` (or `candidates`) wrote with the baselines
latent, single and all-context; shuffled, null and others are told where they are there. An arm's
share is (single - arm) / (single - all-context) in mean loss of the right answer; its interval is
that of the bootstrap over questions, which draws all arms' losses together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from recmas_compiler.evaluation.intervals import CONFIDENCE
from recmas_runtime.core.jsonl import read_json_lines

FLOOR: Final = "single"
CEILING: Final = "all-context"
PREFIX: Final = "answers-"
RESAMPLES: Final = 10_000


def losses_of(path: Path) -> dict[str, float]:
    """Return the loss of every question's right answer."""
    return {line["id"]: line["loss"] for line in read_json_lines(path)}


def shares(folder: Path) -> tuple[int, dict[str, tuple[float, float, float]]]:
    """Return the number of questions, and by arm its share with both ends of its interval."""
    found = {path.stem.removeprefix(PREFIX): path for path in folder.glob(f"{PREFIX}*.jsonl")}
    losses = {arm: losses_of(path) for arm, path in sorted(found.items())}
    asked = sorted(set.intersection(*(set(by_id) for by_id in losses.values())))
    arms = {arm: np.array([by_id[key] for key in asked]) for arm, by_id in losses.items()}
    draws = np.random.default_rng(0).integers(len(asked), size=(RESAMPLES, len(asked)))

    def share(arm: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        floor, ceiling, own = (arms[name][rows].mean(-1) for name in (FLOOR, CEILING, arm))
        result: NDArray[np.float64] = (floor - own) / (floor - ceiling)
        return result

    bounds = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    whole = np.arange(len(asked))
    told = {}
    for arm in arms.keys() - {FLOOR, CEILING}:
        low, high = np.quantile(share(arm, draws), bounds)
        told[arm] = (float(share(arm, whole)), float(low), float(high))
    return len(asked), told


def main() -> None:
    """Print every folder's shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        num, told = shares(folder)
        for arm, (share, low, high) in sorted(told.items()):
            print(f"{folder}, {num} questions: {arm} {share:.1%} ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
