from __future__ import annotations

from pathlib import Path

import pytest

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.onnx import session as onnx_session
from recmas_runtime.engines.onnx.session import (
    call_onnx,
    make_session,
    onnx_runtime,
    physical_cores,
    resolve_device,
)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("150000 100000\n", 1.5), ("max 100000\n", float("inf")), ("", float("inf"))],
)
def test_a_container_may_have_a_quota(tmp_path: Path, text: str, quota: float) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert onnx_session._quota(tmp_path / "cpu.max") == quota
    assert onnx_session._quota(tmp_path / "missing") == float("inf")


def test_hyper_threads_are_one_core(tmp_path: Path) -> None:
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    assert onnx_session._cores_of(tmp_path, {0, 1, 2, 3}) == 2
    assert onnx_session._cores_of(tmp_path, {0, 2}) == 1
    assert onnx_session._cores_of(tmp_path, {9}) == 0


def test_there_is_at_least_one_core() -> None:
    assert physical_cores() >= 1


def test_auto_takes_what_is_there() -> None:
    cuda = "CUDAExecutionProvider" in onnx_runtime().get_available_providers()
    assert resolve_device("auto") == ("cuda" if cuda else "cpu")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(RecmasError, match=r"RM504.*unknown device 'tpu'"):
        resolve_device("tpu")


def test_a_session_has_the_options_it_was_given(hand_bundle: Path) -> None:
    session = make_session(
        hand_bundle / "backbones/one/head.onnx",
        threads=1,
        options={"session.disable_prepacking": "1"},
    )
    options = session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("invalid shape\nat node 7"), "invalid shape"),
        (RuntimeError("out of memory\nat node 7"), "out of memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_failing_call_says_why_in_a_line(error: Exception, reason: str) -> None:
    def fails(*arguments: object) -> None:
        raise error

    with pytest.raises(RecmasError) as caught:
        call_onnx(fails, 1, 2)
    (problem,) = caught.value.problems
    assert problem.code == "RM507"
    assert problem.message.endswith(f" fails: {reason}")
    is_memory = "emory" in reason
    assert problem.message.startswith("memory runs out: ") is is_memory
    assert ("--batch" in problem.hint) is is_memory
    assert caught.value.__cause__ is error
