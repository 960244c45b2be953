"""Closed-form starts whose hidden units detect tokens: when they are there, and what they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from recmas_compiler.links import aligned
from recmas_compiler.links.aligned import (
    SPREAD,
    THRESHOLD,
    align_inner,
    direction_map,
    ridge,
    rms,
    spread_out,
    token_detectors,
)
from recmas_compiler.links.calibration import Calibration
from recmas_compiler.links.modules import LinkModule, make_link

WIDTH = 8
TOKENS = 40


def thoughts(number: int, *, seed: int = 0, noise: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Return thoughts [N, 8], tokens [N] and embeddings [N, 8].

    Every token has a place of its own in a space of few dimensions, and an embedding that has
    nothing to do with it: 40 tokens are more than a linear map of 8 inputs can tell apart.
    """
    fixed, draw = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    places = 2 * torch.randn(TOKENS, WIDTH, generator=fixed)
    table = torch.randn(TOKENS, WIDTH, generator=fixed)
    token_N = torch.randint(TOKENS, (number,), generator=draw)
    hidden_ND = places[token_N] + noise * torch.randn(number, WIDTH, generator=draw)
    return hidden_ND, token_N, table[token_N]


def calibration(number: int) -> Calibration:
    hidden_ND, token_N, next_ND = thoughts(number)
    return Calibration(
        hidden_ND=hidden_ND,
        expected_ND=next_ND,
        next_ND=next_ND,
        token_N=token_N,
        is_held_out_N=torch.arange(number) % 8 == 0,
    )


def align(found: Calibration) -> tuple[LinkModule, aligned.Alignment]:
    link = make_link("projected", "inner", WIDTH, WIDTH)
    return link, align_inner(link, found, link_id="a.inner")


def test_a_unit_speaks_at_its_own_token() -> None:
    hidden_ND, token_N, _ = thoughts(4000)
    weight_UD, bias_U = token_detectors(hidden_ND, token_N, most=TOKENS)
    assert weight_UD.shape == (TOKENS, WIDTH)
    said_NU = hidden_ND.double() @ weight_UD.T + bias_U
    # Units come in order of frequency; each lies where its definition puts it.
    tokens, counts = token_N.unique(return_counts=True)
    order = tokens[counts.argsort(descending=True, stable=True)]
    own_U = torch.stack([said_NU[token_N == token, u].mean() for u, token in enumerate(order)])
    torch.testing.assert_close(own_U, torch.full_like(own_U, SPREAD * (1 - THRESHOLD)))
    mean_U = said_NU.mean(0)
    torch.testing.assert_close(mean_U, torch.full_like(mean_U, -SPREAD * THRESHOLD))


def test_only_frequent_tokens_have_a_unit() -> None:
    hidden_ND, token_N, _ = thoughts(4000)
    token_N[5] = 1000  # seen once
    assert len(token_detectors(hidden_ND, token_N, most=100)[1]) == TOKENS
    assert len(token_detectors(hidden_ND, token_N, most=3)[1]) == 3


def test_an_input_that_never_changes_does_no_harm() -> None:
    hidden_ND, token_N, _ = thoughts(400)
    hidden_ND[:, 2] = 1.0
    weight_UD, bias_U = token_detectors(hidden_ND, token_N, most=8)
    assert torch.isfinite(weight_UD).all()
    assert torch.isfinite(bias_U).all()


def test_detectors_say_what_a_linear_map_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibration(4000)
    link, with_detectors = align(found)
    assert with_detectors.num_detectors == WIDTH  # all that the form has room for
    monkeypatch.setattr(aligned, "SAMPLES_PER_REGRESSOR", 10**6)
    _, affine = align(found)
    assert affine.num_detectors == 0
    assert with_detectors.cosine > affine.cosine + 0.05
    # On thoughts that neither the fit nor the choice has seen.
    hidden_ND, _, next_ND = thoughts(1000, seed=1)
    cosine = cosine_similarity(link(hidden_ND), next_ND, dim=-1).mean().item()
    assert cosine > affine.cosine + 0.05


def test_detectors_learn_on() -> None:
    link, found = align(calibration(4000))
    assert found.num_detectors
    hidden_ND, _, next_ND = thoughts(64, seed=2)
    (link(hidden_ND) - next_ND).square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in link.parameters())


def test_few_samples_give_the_affine_map() -> None:
    link, found = align(calibration(70))
    assert found.num_detectors == 0
    assert not link.proj2.weight.any()


def test_detectors_that_do_no_better_leave_the_affine_map(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calibration(4000)

    def worst(x: Tensor, truth: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        weight, bias = direction_map(x, truth, strength)
        return -weight, -bias

    monkeypatch.setattr(aligned, "direction_map", worst)
    link, alignment = align(found)
    assert alignment.num_detectors == 0
    monkeypatch.setattr(aligned, "SAMPLES_PER_REGRESSOR", 10**6)
    affine, _ = align(found)
    for name, value in affine.state_dict().items():
        assert torch.equal(link.state_dict()[name], value)


def test_a_direction_map_points_better_than_least_squares() -> None:
    hidden_ND, _, next_ND = thoughts(4000)

    def cosine(weight: Tensor, bias: Tensor) -> float:
        answers_NE = hidden_ND.double() @ weight.T + bias
        return cosine_similarity(answers_NE, next_ND.double(), dim=-1).mean().item()

    by_distance = cosine(*ridge(hidden_ND, next_ND, 1e-3))
    assert cosine(*direction_map(hidden_ND, next_ND, 1e-3)) > by_distance


def test_answers_are_spread_as_far_as_the_truth() -> None:
    hidden_ND, _, next_ND = thoughts(4000)
    weight, _ = ridge(hidden_ND, next_ND, 1e-3)
    weight, bias = spread_out(weight, hidden_ND, next_ND, mean_E=next_ND.double().mean(0) + 1)
    answers = hidden_ND.double() @ weight.T + bias
    torch.testing.assert_close(answers.mean(0), next_ND.double().mean(0) + 1)
    assert rms(answers - answers.mean(0)) == pytest.approx(rms(next_ND - next_ND.mean(0)))


def test_a_sample_that_counts_twice_is_two_samples() -> None:
    hidden_ND, _, next_ND = thoughts(300)
    weight_N = torch.ones(300)
    weight_N[:100] = 2
    counted = ridge(hidden_ND, next_ND, 0.1, weight_N=weight_N)
    repeated = ridge(
        torch.cat([hidden_ND, hidden_ND[:100]]), torch.cat([next_ND, next_ND[:100]]), 0.1
    )
    for one, other in zip(counted, repeated, strict=True):
        torch.testing.assert_close(one, other)


def test_sums_over_parts_are_sums_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, _, next_ND = thoughts(300)
    whole = direction_map(hidden_ND, next_ND, 0.1)
    monkeypatch.setattr("recmas_compiler.links.aligned.ROWS_AT_ONCE", 7)
    for one, other in zip(direction_map(hidden_ND, next_ND, 0.1), whole, strict=True):
        torch.testing.assert_close(one, other)
