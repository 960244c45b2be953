"""Statistics: intervals of shares, means and differences, and tests of paired answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Interval:
    """Bounds that hold a figure with some confidence."""

    low: float
    high: float


def wilson(num_right: float, num: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of a share, within 0 and 1.

    Args:
        num_right: May be fractional: the mean over repeated answers to the same questions.
        num: Questions, not answers: several answers to one question are no new questions.
        confidence: Share of such intervals that hold the true value.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it for small samples.
    """
    if num == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / num
    center = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    # The bounds enclose the share; rounding must not deny it at 0 and 1.
    return Interval(max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def pass_at(k: int, *, num_answers: int, num_right: int) -> float:
    """Return the chance that at least one of `k` answers to a question is right, without bias.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    assert 1 <= k <= num_answers
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def mcnemar(num_only_first: int, num_only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test: could chance alone divide them so?"""
    num = num_only_first + num_only_second
    fewer = min(num_only_first, num_only_second)
    tail = sum(math.comb(num, i) for i in range(fewer + 1))
    # Both may be larger than any float; the division of integers is exact until its end.
    return min(1.0, 2 * tail / (1 << num))


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of nothing."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0


_RESAMPLES: Final = 10_000
# Resamples of so many values are drawn at once.
_MOST_VALUES: Final = 2_000_000


def bootstrap(
    values: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Return the percentile bootstrap interval of a mean over questions.

    For two systems on the same questions, give the differences: resampling these is the paired
    bootstrap. The same values and seed give the same interval.

    Source: Efron and Tibshirani 1993, chapters 13 and 16.
    """
    num = len(values)
    if num == 0:
        return Interval(-math.inf, math.inf)
    array = np.asarray(values, np.float64)
    draw = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < _RESAMPLES:
        count = min(_RESAMPLES - len(means), max(1, _MOST_VALUES // num))
        means += array[draw.integers(num, size=(count, num))].mean(axis=1).tolist()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
