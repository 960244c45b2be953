"""Hidden units that each tell one token: the nonlinear half of a closed-form inner link.

What a thought says about the next token is a choice among tokens, and a linear map can only mix
their embeddings. A unit per frequent token, silent for most thoughts and loud for those that its
token followed, lets least squares answer with embeddings instead of averages of them. The direction
of a unit is the linear discriminant between its token's thoughts and all others (R. A. Fisher,
1936), with the covariance of all samples, shrunk.

Shape legend: N samples, D inputs, E outputs, U units.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from recmas_compiler.links.closed_form.least_squares import ROWS_AT_ONCE, moments

# A token that was seen once cannot be told from its one thought.
FEWEST_SEEN: Final = 2
# Added to each input's variance, relative to it: thoughts of rare tokens vary in few directions.
SHRINKAGE: Final = 0.01
# Where a unit begins to speak, between the mean of all thoughts (0) and that of its token's (1).
# Below, everything else is heard too; above, its own token is missed.
THRESHOLD: Final = 0.3
# How far apart these two means are for a unit: gelu tells them apart and is not yet a step.
SPREAD: Final = 4.0


def token_detectors(x_ND: Tensor, token_N: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Return the weight [U, D] and bias [U] of one unit for each of the most frequent tokens.

    Args:
        x_ND: Inputs of the units.
        token_N: The token that followed each.
        most: The largest U. There are fewer where fewer tokens were seen `FEWEST_SEEN` times.
    """
    tokens, class_N, counts = torch.unique(token_N, return_inverse=True, return_counts=True)
    frequent = counts.argsort(descending=True, stable=True)[:most]
    frequent = frequent[counts[frequent] >= FEWEST_SEEN]

    mean_D, covariance_DD = moments(x_ND)
    sums = torch.zeros(len(tokens), x_ND.shape[1], dtype=torch.float64)
    parts = (torch.split(t, ROWS_AT_ONCE) for t in (class_N, x_ND))
    for class_n, x in zip(*parts, strict=True):
        sums.index_add_(0, class_n, x.double())
    away_UD = (sums / counts[:, None])[frequent] - mean_D
    variance_D = covariance_DD.diagonal()
    # An input that never changes tells nothing; the equations must still have a solution.
    shrinkage_D = SHRINKAGE * variance_D.clamp(min=1e-6 * variance_D.mean())
    direction_UD = torch.linalg.solve(covariance_DD + torch.diag(shrinkage_D), away_UD.T).T
    # How far the token's mean lies along its own direction: positive, for the covariance is.
    reach_U = (direction_UD * away_UD).sum(1).clamp(min=1e-12)
    weight_UD = SPREAD / reach_U[:, None] * direction_UD
    return weight_UD, -weight_UD @ mean_D - SPREAD * THRESHOLD
