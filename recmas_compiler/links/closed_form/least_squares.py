"""Linear algebra on samples, in float64: maps to what they should answer, detectors of tokens.

Shape legend: N samples, D inputs, E outputs, U hidden units.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Sums go over so many samples at once: in float64, all of them would take gigabytes.
ROWS_AT_ONCE: Final = 4096

# A token that was seen once cannot be told from its one thought.
FEWEST_SEEN: Final = 2
# Added to each input's variance, relative to it: thoughts of rare tokens vary in few directions.
SHRINKAGE: Final = 0.01
# Where a unit begins to speak, between the mean of all thoughts (0) and that of its token's (1).
# Below, everything else is heard too; above, its own token is missed.
THRESHOLD: Final = 0.3
# How far apart these two means are for a unit: gelu tells them apart and is not yet a step.
SPREAD: Final = 4.0


def ridge(
    x_ND: Tensor,
    y_NE: Tensor,
    strength: float,
    *,
    has_bias: bool = True,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weight [E, D] and bias [E] of the ridge regression from x to y, in float64.

    Args:
        x_ND: Inputs.
        y_NE: Outputs.
        strength: Penalty of each input's weights, relative to the input's sum of squares.
        has_bias: False fits through the origin and returns a bias of zeros.
        weight_N: How much each sample counts; None for all alike.
    """
    shares_N1 = (torch.ones(len(x_ND)) if weight_N is None else weight_N).double()[:, None]
    shares_N1 = shares_N1 / shares_N1.sum()
    parts = list(zip(*(torch.split(t, ROWS_AT_ONCE) for t in (x_ND, y_NE, shares_N1)), strict=True))
    width, height = x_ND.shape[1], y_NE.shape[1]
    x_mean, y_mean = (torch.zeros(size, dtype=torch.float64) for size in (width, height))
    if has_bias:
        for x, y, share_N1 in parts:
            x_mean += (share_N1 * x).sum(0)
            y_mean += (share_N1 * y).sum(0)
    gram_DD = torch.zeros(width, width, dtype=torch.float64)
    products_DE = torch.zeros(width, height, dtype=torch.float64)
    for x, y, share_N1 in parts:
        scaled = share_N1.sqrt() * (x - x_mean)
        gram_DD += scaled.T @ scaled
        products_DE += scaled.T @ (share_N1.sqrt() * (y - y_mean))
    # An input that never changes has no weight to find; its penalty must still not be zero.
    penalty_D = strength * gram_DD.diagonal().clamp(min=1e-6 * gram_DD.diagonal().mean())
    weight_ED = torch.linalg.solve(gram_DD + torch.diag(penalty_D), products_DE).T
    return weight_ED, y_mean - weight_ED @ x_mean


def moments(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and the covariance [D, D] of samples, in float64."""
    mean_D = x_ND.mean(0, dtype=torch.float64)
    sum_DD = torch.zeros(len(mean_D), len(mean_D), dtype=torch.float64)
    for x in torch.split(x_ND, ROWS_AT_ONCE):
        sum_DD += (x - mean_D).T @ (x - mean_D)
    return mean_D, sum_DD / len(x_ND)


def direction_map(x_ND: Tensor, truth_NE: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return the weight [E, D] and bias [E] of a map whose answers point to where the truth does.

    Least squares counts distances, and most of a doubtful answer's distance is that it is short. So
    it is solved twice: the second time for the truth's direction at the length that the first time
    answered with, in units of that length. Answers stay as short as they are doubtful.

    Args:
        x_ND: Inputs.
        truth_NE: Outputs.
        strength: As for `ridge`.
    """
    weight_ED, bias_E = ridge(x_ND, truth_NE, strength)
    length_N1 = torch.cat(
        [
            (x.double() @ weight_ED.T + bias_E).norm(dim=1, keepdim=True)
            for x in torch.split(x_ND, ROWS_AT_ONCE)
        ]
    ).clamp(min=1e-6)
    toward_NE = length_N1.float() * normalize(truth_NE, dim=1)
    return ridge(x_ND, toward_NE, strength, weight_N=1 / length_N1[:, 0])


def spread_out(
    weight_ED: Tensor, x_ND: Tensor, truth_NE: Tensor, *, mean_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the map with a gain: its answers are as far from their mean as the truth from its own.

    Args:
        weight_ED: The map.
        x_ND: Its inputs.
        truth_NE: What it should have answered.
        mean_E: The mean that its answers are to have.
    """
    x_mean = x_ND.mean(0, dtype=torch.float64)
    answered = sum(
        ((x.double() - x_mean) @ weight_ED.T).square().sum().item()
        for x in torch.split(x_ND, ROWS_AT_ONCE)
    )
    gain = rms(truth_NE - truth_NE.mean(0)) / (answered / truth_NE.numel()) ** 0.5
    return gain * weight_ED, mean_E - gain * weight_ED @ x_mean


def token_detectors(x_ND: Tensor, token_N: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Return the weight [U, D] and bias [U] of one unit for each of the most frequent tokens.

    What a thought says about the next token is a choice among tokens, and a linear map can only mix
    their embeddings. A unit per frequent token, silent for most thoughts and loud for those that
    its token followed, lets least squares answer with embeddings instead of averages of them. The
    direction of a unit is the linear discriminant between its token's thoughts and all others
    (R. A. Fisher, 1936), with the covariance of all samples, shrunk.

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


def rms(x: Tensor) -> float:
    """Return the root of the mean square."""
    return x.square().mean(dtype=torch.float64).sqrt().item()
