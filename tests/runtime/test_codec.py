from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from kit.hand_bundle import DELETE, make_plan
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.engines.tensorrt.engine_cache import EngineRecord
from recmas_runtime.formats import codec
from recmas_runtime.formats.codec import from_json, parse_json, read_json_file, to_json
from recmas_runtime.formats.manifest import Manifest, ParityEntry
from recmas_runtime.formats.plan import Plan

STEPS = "prefill, think, send, write, decode, ask"
LATENT_STEPS = "agents.planner.latent_steps"
VARIABLE = "agents.solver.chat_template.x"
SCALAR = "expected true or false or an integer or a number or a string"
KIND = "expected 'field' or 'slot' or 'text'"


def edited(keys: str, value: Any) -> Any:
    whole = json.loads(json.dumps(to_json(make_plan())))
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


def test_half_of_a_surrogate_pair_where_no_text_belongs_is_refused() -> None:
    figures = {"hidden_relative": "\ud800", "logits_relative": 0.0, "link_relative": 0.0}
    case = {"file": "a", "backbone": "one", "figures": figures, "greedy_tokens_equal": True}
    with pytest.raises(RecmasError, match=r"RM404.*half of a surrogate pair"):
        from_json(ParityEntry, case, file="manifest.json")


def test_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_JSON_BYTES", 100)
    (tmp_path / "plan.json").write_text(" " * 101)
    with pytest.raises(RecmasError, match="larger than 100 bytes"):
        read_json_file(Plan, tmp_path / "plan.json", file="plan.json")


def test_an_unknown_key_that_looks_like_a_place_is_refused() -> None:
    for key in ("x - at `$.rounds", "x` - at `$.steps[9]", "x` - at `$.agents[...].y", "` - at `$"):
        assert refusal(edited(key, 1)).startswith("RM404 ")


def test_the_key_of_a_table_is_named_wherever_it_stands(hand_bundle: Path) -> None:
    whole = json.loads((hand_bundle / "manifest.json").read_text())
    whole["parity"][0]["figures"]["last.of[2]"] = "low"
    with pytest.raises(RecmasError) as caught:
        from_json(Manifest, whole, file="manifest.json")
    (problem,) = caught.value.problems
    assert problem.message == ('parity[0].figures.last.of[2]: expected a number, found "low"')


def test_one_wrong_value_among_many_is_found_without_trying_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = edited("name", "x")["agents"]["solver"]
    many = {f"agent{i}": agent for i in range(1000)} | {"last": {**agent, "inner": 3}}
    convert, calls = msgspec.convert, []

    def counted(data: Any, cls: Any) -> Any:
        calls.append(cls)
        return convert(data, cls)

    monkeypatch.setattr(msgspec, "convert", counted)
    assert refusal(edited("agents", many)) == "RM404 agents.last.inner: expected a string, found 3"
    assert 1 < len(calls) < 20


def numbers(node: inspect.Type, path: str) -> Iterator[tuple[str, inspect.Type]]:
    match node:
        case inspect.StructType():
            for field in node.fields:
                yield from numbers(field.type, f"{path}.{field.name}")
        case inspect.UnionType():
            for kind in node.types:
                yield from numbers(kind, path)
        case inspect.VarTupleType():
            yield from numbers(node.item_type, path)
        case inspect.DictType():
            yield from numbers(node.value_type, path)
        case inspect.IntType() | inspect.FloatType():
            yield path, node


@pytest.mark.parametrize("cls", [Plan, Manifest, EngineRecord])
def test_every_number_of_the_formats_is_bounded(cls: type) -> None:
    found = dict(numbers(inspect.type_info(cls), cls.__name__))
    assert len(found) >= 5
    for path, node in found.items():
        if path.count(".") == 1 and path.endswith(".version"):
            continue
        assert isinstance(node, inspect.IntType | inspect.FloatType)
        assert node.ge is not None or node.gt is not None, path
        assert node.le is not None, path
