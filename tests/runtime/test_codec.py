from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from hand_bundle import DELETE, make_plan
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats import codec, manifest, plan
from recmas_runtime.formats.codec import BOUNDS, from_json, parse_json, read_json_file, to_json
from recmas_runtime.formats.manifest import Manifest
from recmas_runtime.formats.plan import Plan

STEPS = "prefill, think, send, write, decode"
LATENT_STEPS = "agents.planner.latent_steps"
VARIABLE = "agents.solver.chat_template.x"
SCALAR = "expected true or false or an integer or a number or a string"
KIND = "expected 'text' or 'field' or 'slot'"


def edited(keys: str, value: Any) -> Any:
    whole = to_json(make_plan())
    *parents, last = keys.split("/")
    place = whole
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    if value is DELETE:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return whole


def refusal(data: Any) -> str:
    with pytest.raises(RecmasError) as caught:
        from_json(Plan, data, file="plan.json")
    (problem,) = caught.value.problems
    assert problem.file == "plan.json"
    return f"{problem.code} {problem.message}"


def test_a_plan_survives_the_way_through_json() -> None:
    text = json.dumps(to_json(make_plan()), allow_nan=False)
    assert from_json(Plan, json.loads(text), file="plan.json") == make_plan()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("agents/planner/inner", 3, "agents.planner.inner: expected a string, found 3"),
        ("agents/planner/inner", DELETE, "agents.planner.inner: missing"),
        ("agents/planner/color", "red", "agents.planner.color: unknown key"),
        ("agents", [], "agents: expected a table, found a list"),
        ("steps", {}, "steps: expected a list, found a table"),
        ("steps/0/op", "jump", f'steps[0].op: expected one of {STEPS}, found "jump"'),
        ("steps/0/op", DELETE, f"steps[0].op: expected one of {STEPS}, found nothing"),
        ("steps/0/round", True, "steps[0].round: expected an integer, found true"),
        ("steps/0/round", 1.0, "steps[0].round: expected an integer, found 1.0"),
        ("steps/0/round", -1, "steps[0].round: -1 is out of bounds, 1 to 64"),
        ("steps/0/reuse_prefix", 0, "steps[0].reuse_prefix: expected true or false, found 0"),
        ("steps/0/variants/0", 1, "steps[0].variants[0]: expected 'first' or 'then', found 1"),
        ("agents/planner/latent_steps", 5000, f"{LATENT_STEPS}: 5000 is out of bounds, 0 to 4096"),
        ("rounds", 65, "rounds: 65 is out of bounds, 1 to 64"),
        ("limits/max_batch", 0, "limits.max_batch: 0 is out of bounds, 1 to 65536"),
        ("sampling/temperature", "hot", 'sampling.temperature: expected a number, found "hot"'),
        ("sampling/temperature", True, "sampling.temperature: expected a number, found true"),
        ("agents/solver/first", 5, "agents.solver.first: expected a list, found 5"),
        ("agents/solver/chat_template/x", None, f"{VARIABLE}: {SCALAR}, found nothing"),
        ("agents/solver/then/0/kind", 1, f"agents.solver.then[0].kind: {KIND}, found 1"),
        ("fields/0", None, "fields[0]: expected a string, found nothing"),
        ("version", "1", 'version: expected a format version, found "1"'),
        ("version", 0, "version: expected a format version, found 0"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_their_path(keys: str, value: Any, message: str) -> None:
    assert refusal(edited(keys, value)) == f"RM404 {message}"


def test_an_infinite_number_is_refused() -> None:
    assert refusal(edited("sampling/top_p", float("inf"))) == (
        "RM404 sampling.top_p: Infinity is not a finite number"
    )


def test_an_integer_too_large_for_a_float_is_refused() -> None:
    assert "is not a finite number" in refusal(edited("sampling/top_p", 10**400))


def test_whole_numbers_are_numbers() -> None:
    read = from_json(Plan, edited("sampling/temperature", 1), file="plan.json")
    assert type(read.sampling.temperature) is float


def test_scalars_of_chat_templates_keep_their_types() -> None:
    values = {"a": True, "b": 1, "c": 1.0, "d": "x", "e": -5}
    read = from_json(Plan, edited("agents/solver/chat_template", values), file="plan.json")
    kept = read.agents["solver"].chat_template
    assert kept == values
    assert [type(v) for v in kept.values()] == [bool, int, float, str, int]


def test_a_newer_version_names_both() -> None:
    with pytest.raises(RecmasError) as caught:
        from_json(Plan, edited("version", 7), file="plan.json")
    (problem,) = caught.value.problems
    assert caught.value.exit_code is Exit.ENVIRONMENT
    assert problem.code == "RM403"
    assert problem.message == "format version 7; this runtime reads up to version 2"


def test_an_older_version_names_both_and_the_command_that_helps() -> None:
    with pytest.raises(RecmasError) as caught:
        from_json(Plan, edited("version", 1), file="plan.json")
    (problem,) = caught.value.problems
    assert caught.value.exit_code is Exit.ENVIRONMENT
    assert problem.code == "RM403"
    assert problem.message == "format version 1; this runtime reads version 2"
    assert problem.hint.startswith(
        "Build it again: recmasc build BUNDLE/spec.yaml --out BUNDLE, or from the spec it came from"
    )


def test_a_newer_version_is_reported_before_its_new_keys() -> None:
    newer = edited("version", 3) | {"a_new_key": 1}
    with pytest.raises(RecmasError, match="RM403"):
        from_json(Plan, newer, file="plan.json")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": 1', "Expecting ',' delimiter at line 1, column 8"),
        (b"", "Expecting value at line 1, column 1"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 5000, "integer"),
    ],
)
def test_what_is_not_json_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(RecmasError, match="RM404") as caught:
        parse_json(raw, file="plan.json")
    assert message in str(caught.value)


def test_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_JSON_BYTES", 100)
    (tmp_path / "plan.json").write_text(" " * 101)
    with pytest.raises(RecmasError, match="larger than 100 bytes"):
        read_json_file(Plan, tmp_path / "plan.json", file="plan.json")


def integer_fields() -> set[tuple[type, str]]:
    found = set()
    for module in (plan, manifest):
        for cls in vars(module).values():
            if dataclasses.is_dataclass(cls) and isinstance(cls, type):
                for name, hint in get_type_hints(cls).items():
                    if hint in (int, int | None) or (
                        get_origin(hint) is tuple and get_args(hint)[0] is int
                    ):
                        found.add((cls, name))
    return found


def test_every_integer_of_the_formats_is_bounded() -> None:
    versions = {(Plan, "version"), (Manifest, "version")}
    assert set(BOUNDS) == integer_fields() - versions
