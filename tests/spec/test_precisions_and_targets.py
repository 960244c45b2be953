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
    measured = loss_figures(NOTHING_LOST).keys() if name != "float32" else set()
    assert precision.loss_limits.keys() == measured
    assert precision.types.keys().isdisjoint(precision.device_refusals)
    assert precision.types.keys() | precision.device_refusals.keys() == set(DEVICES)
    for types in precision.types.values():
        assert (types.norms, types.borders) == ("float32", "float32")


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
    for target in [target for target in TARGETS if "int4" not in buildable(target)]:
        with pytest.raises(RecmasError) as caught:
            parse_spec(SPEC.replace("TARGET", target).replace("PRECISION", "int4"))
        hints[target] = caught.value.problems[0].hint
    assert hints == {"tensorrt": "Use float32, bfloat16 or float16, or target `onnx`."}


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "tensorrt"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_device_cannot_run_is_refused(device: str, precision: str) -> None:
    text = SPEC.replace("TARGET", "onnx").replace("PRECISION", precision)
    text = text.replace("source: models/small", f"source: models/small, device: {device}")
    reason = PRECISIONS[precision].device_refusals.get(device)
    if reason is None:
        assert parse_spec(text).document.backbones["small"].device == device
        return
    with pytest.raises(RecmasError) as caught:
        parse_spec(text)
    (problem,) = caught.value.problems
    assert problem.code == "RM121"
    assert problem.message == (
        f"precision `{precision}` is not supported on device `{device}`: {reason}."
    )
    assert problem.hint == "Use float32, int8 or int4, or another device."


def test_a_figure_that_is_no_number_is_beyond() -> None:
    figures = {"hidden_relative": float("nan"), "link_relative": 0.0, "embeds_relative": 0.1}
    assert list(beyond_tolerance(figures, precision="float32")) == [
        "hidden_relative is nan, allowed is 1e-04",
        "embeds_relative is 1.00e-01, allowed is 1e-06",
    ]
