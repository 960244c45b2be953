"""The runtime as a library: names, settings, records, and when a system ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recmas_runtime as rt
from kit.remote_systems import write_mixed_bundle
from recmas_runtime.formats.manifest import RemoteEntry


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


def _codes(results: list[rt.Answer | rt.RecmasError]) -> list[str]:
    return [
        result.problems[0].code if isinstance(result, rt.RecmasError) else result.answer
        for result in results
    ]


NO_RECORDS: list[Any] = [None, 1, b"7", ["7"], object(), rt.Record]


@pytest.mark.parametrize("given", NO_RECORDS)
def test_what_is_no_record_fails_alone(system: rt.System, given: Any) -> None:
    assert _codes(system.run_batch(["7", given, "8"])) == ["h", "RM500", "i"]
    with pytest.raises(rt.RecmasError, match=r"RM500.*is of the type"):
        system.stream(given)


@pytest.mark.parametrize("given", [None, 1, b"7", rt.Record])
def test_what_is_neither_one_record_nor_several_is_refused(system: rt.System, given: Any) -> None:
    assert _codes(system.run_batch(given)) == ["RM500"]
    with pytest.raises(rt.RecmasError, match=r"RM500.*is of the type"):
        system.run(given)


@pytest.mark.parametrize(
    "given", ["7", {"question": "7"}, rt.Record(id="x", fields={"question": "7"})]
)
def test_a_batch_of_one_is_not_asked_in_pieces(system: rt.System, given: Any) -> None:
    assert _codes(system.run_batch(given)) == ["h"]


def test_several_may_be_any_iterable(system: rt.System) -> None:
    assert _codes(system.run_batch(text for text in "78")) == ["h", "i"]  # type: ignore[arg-type]
    assert [a.answer for a in system.run(iter(["7", "8"]))] == ["h", "i"]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 1.5},
        {"max_new_tokens": "8"},
        {"max_new_tokens": True},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": "1"},
        {"top_k": 1.5},
        {"min_p": None},
        {"repetition_penalty": "1"},
        {"seed": None},
        {"stop": "hi"},
        {"stop": None},
        {"stop": [1]},
        {"stop": {"h": 1}},
        {"sampling": {}},
    ],
)
def test_settings_of_another_type_are_refused(system: rt.System, settings: dict[str, Any]) -> None:
    ((name, _),) = settings.items()
    for ask in (system.run, system.run_batch, system.stream):
        with pytest.raises(rt.RecmasError, match=f"RM505.*{name} is"):
            ask("7", **settings)


def test_settings_may_be_numbers_of_numpy(system: rt.System) -> None:
    answer = system.run(
        "7", max_new_tokens=np.int64(1), temperature=np.float32(0), seed=np.int64(3)
    )  # type: ignore[arg-type]
    assert answer.answer == "h"


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads": 0},
        {"threads": 4097},
        {"threads": "2"},
        {"threads": 1.5},
        {"date": 3},
        {"functions": 3},
        {"functions": {"lookup": 3}},
        {"ask": "me"},
    ],
)
def test_arguments_of_load_that_mean_nothing_are_refused(
    hand_bundle: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(rt.RecmasError, match="RM506"):
        rt.load(hand_bundle, **arguments)


@pytest.mark.parametrize("name", [None, 3, "text@0"])
def test_what_names_no_baseline_is_refused(system: rt.System, name: Any) -> None:
    with pytest.raises(rt.RecmasError, match=r"RM508.*there is no baseline"):
        system.baseline(name)


def test_a_baseline_that_is_refused_is_not_offered(tmp_path: Path) -> None:
    entry = RemoteEntry(model="far", base_url="http://127.0.0.1:9/v1")
    system = rt.load(write_mixed_bundle(tmp_path, entry), threads=1)
    with pytest.raises(rt.RecmasError, match=r"RM508.*latentmas: ") as refused:
        system.baseline("latentmas")
    named = (refused.value.problems[0].hint or "").removesuffix(".").split(" are ")[1].split(", ")
    assert "looplm" in named
    assert "latentmas" not in named


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
