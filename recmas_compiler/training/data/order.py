"""Which records a step learns from: a function of seed and step, so there is nothing to save."""

from __future__ import annotations

import random
from functools import lru_cache


def batch_of(step: int, *, num_examples: int, batch_size: int, seed: int) -> tuple[int, ...]:
    """Return the places of a step's records.

    Every epoch is a permutation of its own; a batch may reach from one into the next.

    Args:
        step: From 0.
        num_examples: Records to draw from.
        batch_size: Records of a step.
        seed: Another seed, another order.
    """
    first = step * batch_size
    places = range(first, first + batch_size)
    return tuple(
        _permutation(num_examples, seed, place // num_examples)[place % num_examples]
        for place in places
    )


@lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311
    return tuple(order)
