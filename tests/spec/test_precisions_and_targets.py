"""The tables of precisions and targets: complete, and what users read is made from them."""

from __future__ import annotations

from typing import get_args

import pytest

from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.manifest import LossEntry
from recmas_runtime.formats.precisions import (
    DEVICES,
    DTYPE_BYTES,
    PRECISIONS,
    TARGET_NAMES,
    TARGETS,
    TOLERANCES,
    Dtype,
    PrecisionName,
    beyond_tolerance,
    buildable,
    loss_figures,
)

SPEC = """
recmas: 1
name: one
backbones: {small: {source: models/small}}
agents: {solver: {backbone: small, prompt: "{{ question }}"}}
answer: {agent: solver}
build: {target: TARGET, precision: PRECISION}
"""
NOTHING_LOST = LossEntry(
    text="text",
    num_tokens=1,
    hidden_cosine=1.0,
    greedy_agreement=1.0,
    reference_loss=2.0,
    loss=2.0,
)


def test_every_name_has_a_row() -> None:
    assert get_args(PrecisionName) == tuple(PRECISIONS)
    assert tuple(TARGETS) == TARGET_NAMES
    assert set(get_args(Dtype)) == set(DTYPE_BYTES)
    assert {target.machine_engines for target in TARGETS.values()} <= {None, *DEVICES}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_says_of_each_target_whether_it_builds_it(name: str) -> None:
    precision = PRECISIONS[name]
    assert precision.targets.isdisjoint(precision.refusals)
    assert precision.targets | precision.refusals.keys() == set(TARGETS)
    if precision.targets:
        assert precision.tolerances.keys() == TOLERANCES.keys()
    measured = loss_figures(NOTHING_LOST).keys() if precision.is_quantized else set()
    assert precision.loss_limits.keys() == measured


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_target_cannot_build_is_refused(target: str, precision: str) -> None:
    text = SPEC.replace("TARGET", target).replace("PRECISION", precision)
    if precision in buildable(target):
        assert parse_spec(text).document.build.precision == precision
        return
    with pytest.raises(RecmasError, match="RM121") as caught:
        parse_spec(text)
    reason = PRECISIONS[precision].refusals[target]
    assert f"precision `{precision}` is not supported for target `{target}`: {reason}." in str(
        caught.value
    )


def test_what_to_use_instead() -> None:
    hints = {}
    for target in TARGETS:
        with pytest.raises(RecmasError) as caught:
            parse_spec(SPEC.replace("TARGET", target).replace("PRECISION", "bfloat16"))
        hints[target] = caught.value.problems[0].hint
    assert hints == {
        "onnx": "Use float32, int8 or int4. To store float32 in half the bytes, set `dtype`.",
        "tensorrt": "Use float32, or target `onnx`.",
    }


def test_a_figure_that_is_no_number_is_beyond() -> None:
    figures = {"hidden_relative": float("nan"), "link_relative": 0.0, "embeds_relative": 0.1}
    assert list(beyond_tolerance(figures, precision="float32")) == [
        "hidden_relative is nan, allowed is 1e-04",
        "embeds_relative is 1.00e-01, allowed is 1e-06",
    ]
