"""The runtime as a library: names, settings, records, and when a system ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt


@pytest.fixture
def system(hand_bundle: Path) -> rt.System:
    return rt.load(hand_bundle, threads=1)


def test_the_package_says_what_it_has() -> None:
    assert set(rt.__all__) < set(dir(rt))
    assert "Trace" in dir(rt)
    assert rt.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rt.nothing  # noqa: B018


def test_a_system_shows_what_it_is(system: rt.System) -> None:
    assert repr(system) == "<System 'by-hand': 2 agents, 2 rounds, on cpu>"
    assert system.fields == ("question",)


def test_settings_may_be_given_by_name(system: rt.System) -> None:
    assert system.run("7").finish_reason == "stop"
    assert system.run("7", max_new_tokens=1).finish_reason == "length"
    assert [a.answer for a in system.run(["7", "8"], stop=("h",))] == ["", "i"]
    base = rt.SamplingPlan(max_new_tokens=1)
    assert system.run("7", sampling=base, max_new_tokens=2).finish_reason == "stop"
    assert "".join(system.stream("7", max_new_tokens=1)) == "h"
    with pytest.raises(rt.RecmasError, match=r"RM505.*temperature is 50"):
        system.run("7", temperature=50)


def test_batches_take_texts_fields_and_records(system: rt.System) -> None:
    found = system.run_batch(
        ["1", {"question": "2", "id": 7, "gold": "c"}, rt.Record(id="x", fields={"question": "3"})]
    )
    answers = [answer for answer in found if isinstance(answer, rt.Answer)]
    assert [(a.id, a.answer, a.record) for a in answers] == [
        ("1", "b", {"question": "1"}),
        (7, "c", {"question": "2", "id": 7, "gold": "c"}),
        ("x", "d", {"question": "3"}),
    ]
    assert {answer.batch_size for answer in answers} == {3}


@pytest.mark.parametrize("given", [1.5, True, None, "", "x" * 2000, ["a"]])
def test_an_id_that_is_none_is_refused(system: rt.System, given: object) -> None:
    (error,) = system.run_batch([{"question": "7", "id": given}])
    assert isinstance(error, rt.RecmasError)
    assert error.problems[0].code == "RM500"


def test_a_closed_system_answers_nothing(hand_bundle: Path) -> None:
    with rt.load(hand_bundle, threads=1) as system:
        other = system.baseline("single")
        assert system.run("7").answer == "h"
    for ask in (system.run, system.stream, system.run_batch):
        with pytest.raises(rt.RecmasError, match=r"RM522.*was closed"):
            ask("7")
    assert repr(system).endswith("closed>")
    assert other.run("7").answer == "h"
    system.close()


def test_a_trace_may_be_anything_that_takes_batches(system: rt.System) -> None:
    class Kept:
        def __init__(self) -> None:
            self.messages: dict[str, np.ndarray] = {}

        def add_batch(self, records: object, events: object, messages: list[dict]) -> None:
            self.messages |= messages[0]

    trace = Kept()
    system.run_batch(["7"], trace=trace)
    assert sorted(trace.messages) == ["planner->solver@1", "planner->solver@2", "solver->planner@1"]


def test_devices_are_listed_whole(hand_bundle: Path) -> None:
    with pytest.raises(rt.RecmasError, match=r"RM504.*auto, cpu, cuda, tensorrt"):
        rt.load(hand_bundle, device="gpu")
