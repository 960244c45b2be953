"""Shapes of optimization profiles."""

from __future__ import annotations

import pytest

from recmas_runtime.engines.tensorrt.static_graph import (
    Shapes,
    choose_capacity,
    decoder_ranges,
    head_ranges,
    profile_shapes,
)

SHAPES = Shapes(
    capacities=(576, 832),
    max_rows=16,
    max_groups=2,
    link_hidden=(64, 128),
    prompt_positions=512,
)
INPUTS = {
    "inputs_embeds": ("batch", "positions", 64),
    "write_index": ("batch",),
    "key.0": ("batch", 3, 576, 16),
    "inner.w1": ("groups", 64, "link_hidden"),
    "constant": (1, 2),
}


def test_prompts_and_steps_have_a_profile_each() -> None:
    prefill, step = (profile_shapes(INPUTS, ranges) for ranges in decoder_ranges(SHAPES, 576))
    assert prefill["inputs_embeds"] == ((1, 1, 64), (2, 512, 64), (16, 576, 64))
    assert step["inputs_embeds"] == ((1, 1, 64), (2, 1, 64), (16, 1, 64))
    assert prefill["key.0"] == step["key.0"] == ((1, 3, 576, 16), (2, 3, 576, 16), (16, 3, 576, 16))
    assert step["inner.w1"] == ((1, 64, 64), (2, 64, 128), (2, 64, 128))
    assert step["write_index"] == ((1,), (2,), (16,))
    assert "constant" not in step


def test_a_prompt_is_never_longer_than_the_cache() -> None:
    prefill, _ = decoder_ranges(SHAPES, 256)
    assert (prefill["positions"].typical, prefill["positions"].most) == (256, 256)


def test_rows_are_a_multiple_of_the_groups_in_every_shape() -> None:
    for ranges in decoder_ranges(SHAPES, 576):
        for size in ("least", "typical", "most"):
            rows, groups = (getattr(ranges[name], size) for name in ("batch", "groups"))
            assert rows % groups == 0


def test_the_head_takes_any_row_of_a_batch() -> None:
    assert profile_shapes({"hidden": ("batch", 64)}, head_ranges(SHAPES)) == {
        "hidden": ((1, 64), (1, 64), (16, 64))
    }


@pytest.mark.parametrize(("needed", "chosen"), [(1, 576), (576, 576), (577, 832), (833, None)])
def test_the_smallest_capacity_that_holds_the_batch(needed: int, chosen: int | None) -> None:
    assert choose_capacity((832, 576), needed) == chosen
