"""Closed-form starts for links: seconds of linear algebra instead of thousands of training steps.

An inner link starts as the affine map from a thought to the mean embedding of the token that would
follow it; an outer link as the affine map between the embeddings of the tokens that both
vocabularies know. The nonlinear branch starts silent but trainable, except where the form of the
link leaves no other place for the map, and where enough text is given: then each of its hidden
units begins as the detector of one frequent token.

Least squares answers with blurred averages, all of them near the mean embedding, and a rollout that
feeds on them ends there: SmolLM2-135M then writes nothing but line breaks. So the map's answers are
spread out again as far as real embeddings are, which costs a little of the cosine.

Shape legend: N samples, D inputs, E outputs, U hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.calibration import HELD_OUT_EVERY, Calibration
from recmas_compiler.links.modules import LinkModule, randomize, seeded_generator
from recmas_runtime.core.errors import fail

# Ridge strengths to choose from, relative to each input's own sum of squares: inputs of a backbone
# differ in scale by a factor of ten, and none deserves more shrinking for it.
INNER_STRENGTHS: Final = (0.1, 0.3, 1.0, 3.0)
OUTER_STRENGTHS: Final = (0.001, 0.01, 0.1, 1.0)
# For finding a map that is known to exist: only keeps the equations solvable.
EXACT: Final = 1e-6
# With token detectors: they are rarely active together, so there is little to keep apart.
DETECTOR_STRENGTH: Final = 0.003
# Samples for each detector and each input; with fewer, they learn the samples by heart.
SAMPLES_PER_REGRESSOR: Final = 8

# gelu(x) is x / 2 for small x. At this size of its inputs the branch is linear to 0.1 %.
SMALL_SIGNAL: Final = 1e-3
# Normed inputs are of size one, and W2 is fitted to what gelu makes of them: less extreme will do.
NORMED_SIGNAL: Final = 0.1
# How far the branch outweighs the thought that it is added to, before a final norm.
BRANCH_WEIGHT: Final = 10.0

MIN_SHARED_TOKENS: Final = 64

# Sums go over so many samples at once: in float64, all of them would take gigabytes.
ROWS_AT_ONCE: Final = 4096

# A token that was seen once cannot be told from its one thought.
FEWEST_SEEN: Final = 2
# Added to each input's variance, relative to it: thoughts of rare tokens vary in few directions.
SHRINKAGE: Final = 0.01
# Where a unit becomes active, between the mean of all thoughts (0) and that of its token's (1).
# Below, it detects everything else too; above, it misses its own token.
THRESHOLD: Final = 0.3
# How far apart these two means are for a unit: gelu tells them apart and is not yet a step.
SPREAD: Final = 4.0


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How well a closed-form start does on samples it was not fitted to.

    Attributes:
        cosine: Mean cosine between what the link answers and the embedding it should answer.
        strength: Ridge strength chosen; 0 for the identity.
        num_detectors: Hidden units that start as detectors of tokens.
    """

    cosine: float
    strength: float
    num_held_out: int
    num_detectors: int = 0


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What a link is fitted to and judged by.

    Attributes:
        x_ND: What the link reads.
        y_NE: What it should answer, to fit to.
        truth_NE: What it should answer, to judge by.
    """

    x_ND: Tensor
    y_NE: Tensor
    truth_NE: Tensor
    is_held_out_N: Tensor

    def part(self, chosen_N: Tensor) -> _Samples:
        return _Samples(
            x_ND=self.x_ND[chosen_N],
            y_NE=self.y_NE[chosen_N],
            truth_NE=self.truth_NE[chosen_N],
            is_held_out_N=self.is_held_out_N[chosen_N],
        )


@torch.no_grad()
def align_inner(link: nn.Module, calibration: Calibration, *, link_id: str) -> Alignment:
    """Set an inner link's weights so that thoughts become the embeddings of what follows them.

    Args:
        link: Of any kind; changed in place.
        link_id: Seeds what stays random.
    """
    samples = _Samples(
        x_ND=calibration.hidden_ND,
        y_NE=calibration.expected_ND,
        truth_NE=calibration.next_ND,
        is_held_out_N=calibration.is_held_out_N,
    )
    assert isinstance(link, LinkModule), "only links have a closed form"
    randomize(link, link_id=link_id)

    def fit(known: _Samples, strength: float) -> None:
        x_ND, (weight_DD, bias_D) = known.x_ND, _spread_map(known, strength)
        if link.residual_proj is not None:
            _express_in_skip(link, x_ND, weight_DD, bias_D)
        elif link.pre_norm is None:
            _express_in_small_branch(link, x_ND, _affine(x_ND, weight_DD, bias_D), link_id)
        else:
            _express_in_normed_branch(link, x_ND, _affine(x_ND, weight_DD, bias_D), link_id)
        if link.post_norm is not None:
            _fit_norm(link.post_norm, link.unnormed(x_ND), _affine(x_ND, weight_DD, bias_D))

    affine = _fit_best(link, samples, fit, INNER_STRENGTHS)
    # Detectors need a threshold, and stand beside an affine map rather than carrying it.
    may_detect = link.form.has_skip_matrix and link.form.has_biases and link.form.post is None
    if calibration.token_N is None or not may_detect:
        return affine
    return _with_detectors(link, samples, calibration.token_N, affine)


@torch.no_grad()
def align_outer(
    link: nn.Module, source: TorchBackbone, target: TorchBackbone, *, link_id: str
) -> Alignment:
    """Set an outer link's weights so that embeddings of the source become those of the target.

    Between agents on equal backbones this is the identity (up to the norm that `ln_residual` has).

    Args:
        link: Of any kind; changed in place.
        link_id: Seeds what stays random.

    Raises:
        RecmasError: RM121 if the vocabularies have too little in common.
    """
    is_same = source.facts.identity == target.facts.identity
    samples = _own_embeddings(source) if is_same else _shared_embeddings(source, target, link_id)
    assert isinstance(link, LinkModule), "only links have a closed form"
    randomize(link, link_id=link_id)

    def fit(known: _Samples, strength: float) -> None:
        assert link.residual_proj is not None, "outer links have it, for widths may differ"
        if is_same:
            _silence(link.proj2)
            _silence(link.residual_proj)
            nn.init.eye_(link.residual_proj.weight)
        else:
            _express_in_skip(link, known.x_ND, *_spread_map(known, strength))
        if link.post_norm is not None:
            _fit_norm(link.post_norm, link.unnormed(known.x_ND), known.truth_NE)

    return _fit_best(link, samples, fit, (0.0,) if is_same else OUTER_STRENGTHS)


def _spread_map(known: _Samples, strength: float) -> tuple[Tensor, Tensor]:
    """Return the ridge map with its answers as far from their mean as the truth is from its own."""
    weight_ED, bias_E = ridge(known.x_ND, known.y_NE, strength)
    mean_E = weight_ED @ known.x_ND.mean(0, dtype=torch.float64) + bias_E
    return spread_out(weight_ED, known.x_ND, known.truth_NE, mean_E=mean_E)


def _with_detectors(
    link: LinkModule, samples: _Samples, token_N: Tensor, affine: Alignment
) -> Alignment:
    """Let the branch detect tokens, if there are samples enough and it does better so.

    What is measured is fitted to the known samples; what stays, to all of them.
    """
    known, held_out = samples.part(~samples.is_held_out_N), samples.part(samples.is_held_out_N)
    width = known.x_ND.shape[1]
    most = min(width, len(known.x_ND) // SAMPLES_PER_REGRESSOR - width)
    if most <= 0:
        return affine
    before = {name: value.clone() for name, value in link.state_dict().items()}
    _set_detectors(link, known, token_N[~samples.is_held_out_N], most)
    cosine = _mean_cosine(link(held_out.x_ND), held_out.truth_NE)
    if not cosine > affine.cosine:  # not a number is no better either
        link.load_state_dict(before)
        return affine
    num_detectors = _set_detectors(link, samples, token_N, most)
    return replace(affine, cosine=cosine, strength=DETECTOR_STRENGTH, num_detectors=num_detectors)


def _set_detectors(link: LinkModule, known: _Samples, token_N: Tensor, most: int) -> int:
    """Make hidden units detect tokens, fit everything behind them, and return how many there are.

    Units that are left over stay silent and can learn.
    """
    width = known.x_ND.shape[1]
    assert link.residual_proj is not None, "the affine half is in there"
    normed_ND = known.x_ND if link.pre_norm is None else link.pre_norm(known.x_ND)
    weight_UD, bias_U = token_detectors(normed_ND, token_N, most=most)
    num_detectors = len(bias_U)
    link.proj1.weight[:num_detectors] = weight_UD.float()
    link.proj1.bias[:num_detectors] = bias_U.float()
    active_NU = link.branch(known.x_ND)[:, :num_detectors]
    inputs_NF, truth_NE = torch.cat([known.x_ND, active_NU], dim=1), known.truth_NE
    weight_EF, _ = direction_map(inputs_NF, truth_NE, DETECTOR_STRENGTH)
    weight_EF, bias_E = spread_out(
        weight_EF, inputs_NF, truth_NE, mean_E=truth_NE.mean(0, dtype=torch.float64)
    )
    _set_affine(link.residual_proj, weight_EF[:, :width], bias_E)
    _silence(link.proj2)
    link.proj2.weight[:, :num_detectors] = weight_EF[:, width:]
    return num_detectors


def _fit_best(
    link: LinkModule,
    samples: _Samples,
    fit: Callable[[_Samples, float], None],
    strengths: tuple[float, ...],
) -> Alignment:
    """Leave the link with the strength that does best on the held-out samples."""
    known, held_out = samples.part(~samples.is_held_out_N), samples.part(samples.is_held_out_N)

    def cosine(strength: float) -> float:
        fit(known, strength)
        return _mean_cosine(link(held_out.x_ND), held_out.truth_NE)

    best = max(strengths, key=cosine)
    return Alignment(
        cosine=cosine(best),  # fits once more: the link keeps the last fit
        strength=best,
        num_held_out=len(held_out.x_ND),
    )


def _mean_cosine(answers_NE: Tensor, truth_NE: Tensor) -> float:
    return cosine_similarity(answers_NE, truth_NE, dim=-1).mean().item()


def _express_in_skip(link: LinkModule, x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor) -> None:
    """Make W3 the map and the branch silent; without biases, the closest map through the origin."""
    assert link.residual_proj is not None, "there is nowhere else to put it"
    _silence(link.proj2)
    if not link.form.has_biases:
        wanted_NE = _affine(x_ND, weight_ED, bias_E)
        weight_ED, bias_E = ridge(x_ND, wanted_NE, EXACT, has_bias=False)
    _set_affine(link.residual_proj, weight_ED, bias_E)


def _express_in_small_branch(
    link: LinkModule, x_ND: Tensor, wanted_ND: Tensor, link_id: str
) -> None:
    """Make h + W2 gelu(W1 h) the map A: where gelu is x / 2, that is W2 W1 / 2 = A - I.

    Without biases, A is the closest map through the origin.
    """
    weight_DD, bias_D = ridge(x_ND, wanted_ND, EXACT, has_bias=link.form.has_biases)
    turn_DD, scale = _orthogonal(len(weight_DD), link_id), SMALL_SIGNAL / rms(x_ND)
    identity_DD = torch.eye(len(weight_DD), dtype=torch.float64)
    _set_affine(link.proj1, scale * turn_DD, torch.zeros(len(weight_DD)))
    _set_affine(link.proj2, 2 / scale * (weight_DD - identity_DD) @ turn_DD.T, bias_D)


def _express_in_normed_branch(
    link: LinkModule, x_ND: Tensor, wanted_ND: Tensor, link_id: str
) -> None:
    """Fit W2 so that h + W2 gelu(W1 pre(h)) is what is wanted, or before a norm points there."""
    width = x_ND.shape[1]
    _set_affine(link.proj1, NORMED_SIGNAL * _orthogonal(width, link_id), torch.zeros(width))
    branch_ND = link.branch(x_ND)
    scale = 1.0 if link.post_norm is None else BRANCH_WEIGHT * rms(x_ND) / rms(wanted_ND)
    has_bias = link.form.has_biases
    _set_affine(link.proj2, *ridge(branch_ND, scale * wanted_ND - x_ND, EXACT, has_bias=has_bias))


def _fit_norm(norm: nn.LayerNorm | nn.RMSNorm, x_NE: Tensor, y_NE: Tensor) -> None:
    """Set a norm's scale and bias to the least-squares ones, each dimension on its own.

    An RMS norm gets the mean length as its scale, so that directions stay.
    """
    if isinstance(norm, nn.RMSNorm):
        norm.weight.fill_(y_NE.double().norm(dim=1).mean() / y_NE.shape[1] ** 0.5)
        return
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    x, y = norm(x_NE).double(), y_NE.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    scale_E = ((x - x_mean) * (y - y_mean)).sum(0) / ((x - x_mean) ** 2).sum(0).clamp(min=1e-12)
    norm.weight.copy_(scale_E)
    norm.bias.copy_(y_mean - scale_E * x_mean)


def _affine(x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor) -> Tensor:
    return x_ND.double() @ weight_ED.T + bias_E


def _set_affine(layer: nn.Linear, weight_ED: Tensor, bias_E: Tensor) -> None:
    layer.weight.copy_(weight_ED)
    if layer.bias is not None:
        layer.bias.copy_(bias_E)


def _silence(layer: nn.Linear) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _orthogonal(width: int, link_id: str) -> Tensor:
    draw = seeded_generator(f"orthogonal:{link_id}")
    random_DD = torch.randn(width, width, generator=draw, dtype=torch.float64)
    turn_DD: Tensor = torch.linalg.qr(random_DD).Q
    return turn_DD


def _own_embeddings(backbone: TorchBackbone) -> _Samples:
    """Pair every token's embedding with itself."""
    table_VD = _embeddings(backbone, range(backbone.facts.vocab_size))
    is_held_out_V = torch.arange(len(table_VD)) % HELD_OUT_EVERY == 0
    return _Samples(x_ND=table_VD, y_NE=table_VD, truth_NE=table_VD, is_held_out_N=is_held_out_V)


def _shared_embeddings(source: TorchBackbone, target: TorchBackbone, link_id: str) -> _Samples:
    """Pair the embeddings of tokens with equal text."""
    source_ids, target_ids = _ids_by_text(source), _ids_by_text(target)
    shared = [text for text in source_ids if text in target_ids]
    if len(shared) < MIN_SHARED_TOKENS:
        raise fail(
            "RM121",
            f"link {link_id!r} cannot be aligned: the vocabularies of {source.facts.source!r} and "
            f"{target.facts.source!r} share {len(shared)} tokens, {MIN_SHARED_TOKENS} are needed",
            hint="Use `init: random` for it, or trained weights.",
        )
    x_ND = _embeddings(source, [source_ids[text] for text in shared])
    y_NE = _embeddings(target, [target_ids[text] for text in shared])
    is_held_out_N = torch.arange(len(shared)) % HELD_OUT_EVERY == 0
    return _Samples(x_ND=x_ND, y_NE=y_NE, truth_NE=y_NE, is_held_out_N=is_held_out_N)


def _embeddings(backbone: TorchBackbone, ids: Sequence[int]) -> Tensor:
    """Return the embeddings [N, D] on the CPU in float32, wherever the backbone is."""
    return backbone.embed(torch.tensor(ids, device=backbone.model.device)).float().cpu()


def _ids_by_text(backbone: TorchBackbone) -> dict[str, int]:
    """Return the token of every text that a single ordinary token spells, in order of id."""
    tokenizer = backbone.tokenizer.backend_tokenizer
    # Decoded behind another token, a token of the SentencePiece kind keeps its leading space.
    anchor = tokenizer.encode("a", add_special_tokens=False).ids[-1]
    size = min(tokenizer.get_vocab_size(), backbone.facts.vocab_size)
    texts = tokenizer.decode_batch([[anchor, i] for i in range(size)], skip_special_tokens=True)
    num_chars = len(tokenizer.decode([anchor]))
    found: dict[str, int] = {}
    for i, text in enumerate(texts):
        spelled = text[num_chars:]
        if spelled and "\ufffd" not in spelled:  # parts of a character have no text of their own
            found.setdefault(spelled, i)
    return found


# Linear algebra on samples, in float64.


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
    """Return the map with a gain that lets its answers lie as far from their mean as the truth."""
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
