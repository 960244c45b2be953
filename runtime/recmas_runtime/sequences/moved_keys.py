"""Rows of a cache at other positions than they were computed at.

Angles are proportional to positions, so turning by those of the difference leads from one position
to the other, whatever the first one was. That scaled rotary embeddings make keys longer changes
nothing: it is by the same factor everywhere. RoFormer: arXiv:2104.09864.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.formats.layers import Rotation

FloatArray = NDArray[np.float32]


class Turn(NamedTuple):
    """What turns rows [..., D], in any library: rows * cosine + rows[..., partner] * sine.

    Attributes:
        cosine: [D], 1 for numbers that stay.
        sine: [D] with its sign, 0 for numbers that stay.
        partner: [D], index of the other number of the pair; of itself where a number stays.
    """

    cosine: FloatArray
    sine: FloatArray
    partner: NDArray[np.int64]


def turn_by(offset: int, rotation: Rotation, *, width: int) -> Turn:
    """Return what moves rows of width D by `offset` positions. Angles are computed in float64."""
    count = len(rotation.inv_freq)
    if rotation.layout == "halves":
        first = rotation.start + np.arange(count)
        second = first + count
    else:
        first = rotation.start + 2 * np.arange(count)
        second = first + 1
    angles = offset * np.asarray(rotation.inv_freq, dtype=np.float64)
    cosine, sine, partner = np.ones(width), np.zeros(width), np.arange(width)
    cosine[first] = cosine[second] = np.cos(angles)
    sine[first], sine[second] = -np.sin(angles), np.sin(angles)
    partner[first], partner[second] = second, first
    return Turn(cosine.astype(np.float32), sine.astype(np.float32), partner)


def moved_keys(keys: FloatArray, rotation: Rotation | None, offset: int) -> FloatArray:
    """Return keys [..., P, D] as they are `offset` positions further on.

    Args:
        keys: Or values, of a tensor whose rows turn. They are left as they are.
        rotation: As `RowPositions.of_tensor` tells it; None where they are the same everywhere.
        offset: Below 0 for earlier positions.
    """
    if rotation is None or offset == 0:
        return keys
    cosine, sine, partner = turn_by(offset, rotation, width=keys.shape[-1])
    # Not by an index, which puts the axis of width first in memory.
    moved: FloatArray = np.take(keys, partner, axis=-1)
    moved *= sine
    moved += keys * cosine
    return moved
