from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.prompts.sampler import Sampler, StopMatcher, check_sampling, penalize, warp

WARM = SamplingPlan(temperature=1.0)


def random_logits(rows: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.7},
        {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 0.6},
    ],
)
def test_what_is_kept_is_what_transformers_keeps(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    from transformers.generation import logits_process as reference

    sampling = structs.replace(WARM, **settings)
    logits = random_logits(4, 1000)
    written = [[1, 5, 5], [2, 900, 3], [7, 7, 7], [0, 1, 2]]
    expected = torch.from_numpy(logits.copy())
    steps = [
        reference.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        reference.TemperatureLogitsWarper(sampling.temperature),
    ]
    if sampling.top_k:
        steps.append(reference.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        steps.append(reference.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(reference.MinPLogitsWarper(sampling.min_p))
    for step in steps:
        expected = step(torch.tensor(written), expected)

    scores = logits.astype(np.float64)
    for row, ids in zip(scores, written, strict=True):
        penalize(row, set(ids), sampling.repetition_penalty)
    kept = warp(scores, sampling)

    np.testing.assert_array_equal(np.isinf(kept), np.isinf(expected.numpy()))
    # equal up to the shift that softmax does not see
    wanted = torch.softmax(expected, dim=-1).numpy()
    found = np.exp(kept) / np.exp(kept).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_ties_at_the_edge_of_top_k_stay() -> None:
    kept = warp(np.array([[1.0, 2.0, 2.0, 3.0]]), structs.replace(WARM, top_k=2))
    assert np.isfinite(kept).tolist() == [[False, True, True, True]]


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logits = np.log(probabilities)[None].astype(np.float32)
    sampler = Sampler(WARM, [3])
    draws = [int(sampler.choose(logits)[0]) for _ in range(4000)]
    counts = np.bincount(draws, minlength=4)
    # chi-squared with three degrees of freedom: 16.3 is exceeded once in a thousand seeds
    expected = probabilities * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_equal_seeds_give_equal_tokens() -> None:
    logits = random_logits(1, 200)
    runs = [
        [int(s.choose(logits)[0]) for _ in range(20)] for s in (Sampler(WARM, [9]) for _ in "ab")
    ]
    assert runs[0] == runs[1]


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(3, 500)
    together = Sampler(structs.replace(WARM, repetition_penalty=1.3), [10, 11, 12])
    alone = Sampler(structs.replace(WARM, repetition_penalty=1.3), [11])
    batched = [together.choose(logits) for _ in range(30)]
    for tokens in batched:
        assert tokens[1] == alone.choose(logits[1:2])[0]


def test_rows_may_be_fewer_than_samples() -> None:
    logits = random_logits(3, 500)
    whole, part = Sampler(WARM, [1, 2, 3]), Sampler(WARM, [1, 2, 3])
    expected = whole.choose(logits)
    np.testing.assert_array_equal(part.choose(logits[[2, 0]], [2, 0]), expected[[2, 0]])


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    assert Sampler(SamplingPlan(), [0]).choose(np.float32([[1, 3, 3, 2]])).tolist() == [1]


def test_greedy_heeds_the_repetition_penalty() -> None:
    sampler = Sampler(SamplingPlan(repetition_penalty=2.0), [0])
    logits = np.float32([[1.0, 3.0, 2.0]])
    assert [int(sampler.choose(logits)[0]) for _ in range(3)] == [1, 2, 1]


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    sampler = Sampler(SamplingPlan(temperature=1e-300), [0])
    assert sampler.choose(np.float32([[1, 3, 2]])).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_engine_failure(bad: float) -> None:
    with pytest.raises(RecmasError, match="RM507"):
        Sampler(SamplingPlan(), [0]).choose(np.float32([[0, bad]]))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecmasError) as caught:
        check_sampling(structs.replace(SamplingPlan(), **settings))
    (problem,) = caught.value.problems
    ((name, value),) = settings.items()
    assert problem.code == "RM505"
    assert problem.message == f"{name} is {value!r}"
    assert caught.value.exit_code is Exit.USAGE


def test_all_bad_settings_are_reported_at_once() -> None:
    with pytest.raises(RecmasError) as caught:
        check_sampling(SamplingPlan(temperature=-1, top_p=2, top_k=-3))
    assert len(caught.value.problems) == 3


def cut_at_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """What a matcher must do, one character at a time and without holding anything back."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(
    pieces=st.lists(st.text("ab.", max_size=4), max_size=12),
    stop=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_across_pieces(pieces: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    text = "".join(matcher.push(piece) for piece in pieces)
    text += matcher.flush()
    assert (text, matcher.stopped) == cut_at_stop("".join(pieces), stop)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nQ:"])
    assert [matcher.push(p) for p in ("one", "\n", "\n", "two\n\n", "Q", ":", "x")] == [
        "one", "", "", "\n\ntwo", "", "", "",
    ]  # fmt: skip
    assert matcher.stopped
