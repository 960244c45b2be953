"""Statistics, against published and hand-made values."""

from __future__ import annotations

import math

import pytest

from recmas_compiler.evaluation.intervals import Interval, bootstrap, mcnemar, mean, pass_at, wilson


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson(num_right: int, num: int, low: float, high: float) -> None:
    interval = wilson(num_right, num)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_of_nothing_and_of_means() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    assert wilson(10, 100).low < wilson(10.5, 100).low < wilson(11, 100).low


@pytest.mark.parametrize(
    ("k", "num_answers", "num_right", "chance"),
    [
        (1, 10, 1, 0.1),
        (2, 5, 2, 0.7),
        (5, 5, 1, 1.0),
        (3, 4, 2, 1.0),
        (3, 10, 0, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at(k: int, num_answers: int, num_right: int, chance: float) -> None:
    assert pass_at(k, num_answers=num_answers, num_right=num_right) == pytest.approx(chance)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        (9, 1, 0.021484375),
        (0, 1, 1.0),
    ],
)
def test_mcnemar(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p)


def test_mcnemar_of_thousands() -> None:
    assert 0.0 < mcnemar(2000, 2200) < 0.01
    assert not math.isnan(mcnemar(0, 5000))


def test_mean() -> None:
    assert mean([]) == 0.0
    assert mean([True, False]) == 0.5


def test_bootstrap_of_equal_values_and_of_nothing() -> None:
    assert bootstrap([0.25] * 10) == Interval(0.25, 0.25)
    assert bootstrap([]) == Interval(-math.inf, math.inf)


def test_bootstrap_is_that_of_two_values() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with 1/4, 1/2, 1/4.
    assert bootstrap([0.0, 1.0]) == Interval(0.0, 1.0)
    assert bootstrap([0.0, 1.0], confidence=0.4) == Interval(0.5, 0.5)


def test_bootstrap_of_many_values_is_nearly_normal() -> None:
    values = [math.sin(i) for i in range(400)]
    error = math.sqrt(sum((v - mean(values)) ** 2 for v in values)) / 400
    interval = bootstrap(values)
    assert interval == bootstrap(values)
    # Ten thousand resamples give the bounds to a few hundredths of an error.
    assert interval.low == pytest.approx(mean(values) - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean(values) + 1.96 * error, abs=0.1 * error)
