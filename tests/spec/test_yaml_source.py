"""YAML 1.2 scalars and the places of keys, values and pieces of text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.specs import PAIR
from recmas_compiler.spec.document.yaml_source import Value, parse_yaml, resolve, write_yaml
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

SCALARS: dict[str, object] = {
    "5e-4": 5e-4,
    "1e3": 1000.0,
    "+12": 12,
    "-0": 0,
    "017": 17,
    "0o17": 15,
    "0xFF": 255,
    ".5": 0.5,
    "1.": 1.0,
    "-.inf": -math.inf,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "": None,
    # text in YAML 1.2, something else in YAML 1.1
    "no": "no",
    "On": "On",
    "y": "y",
    "0b11": "0b11",
    "1_000": "1_000",
    "12:30": "12:30",
    "2026-11-20": "2026-11-20",
    "0o18": "0o18",
    "1.2.3": "1.2.3",
    "tRue": "tRue",
    ".infinity": ".infinity",
}


@pytest.mark.parametrize("text", SCALARS)
def test_yaml_1_2_scalars(text: str) -> None:
    value = resolve(text)
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


def test_quotes_make_text() -> None:
    assert parse_yaml("[\"1\", 'true', 1]", file="f").value == ["1", "true", 1]


def test_blocks_are_text() -> None:
    assert parse_yaml("a: |\n  12\nb: >\n  no\n  go\n", file="f").value == {
        "a": "12\n",
        "b": "no go\n",
    }


@settings(deadline=None)
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()))
def test_written_scalars_read_back(value: bool | int | float | str | None) -> None:
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        return  # no character of its own; no file can hold it
    if isinstance(value, float) and math.isinf(value):
        return  # no setting is infinite
    written = write_yaml({"key": value, "list": (value,)})
    assert parse_yaml(written, file="f").value == {"key": value, "list": [value]}
    if isinstance(value, str):  # nor do readers of YAML 1.1 take text for anything else
        assert yaml.safe_load(written) == {"key": value, "list": [value]}


@settings(deadline=None)
@given(st.text(alphabet="ab \n\t\"'#:-{}|\xa0\x85\u2028\ufeff\U0001f600", max_size=12))
def test_written_text_reads_back(text: str) -> None:
    written = write_yaml({"a": text, "b": {"c": text}, "d": 1})
    assert parse_yaml(written, file="f").value == {"a": text, "b": {"c": text}, "d": 1}


def nested() -> st.SearchStrategy[Value]:
    text = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=4)
    return st.recursive(
        text, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=12
    )


@settings(deadline=None)
@given(nested())
def test_places_of_values_hold_what_they_say(value: Value) -> None:
    text = yaml.safe_dump({"root": value}, default_flow_style=None, sort_keys=False)
    source = parse_yaml(text, file="f")
    lines = text.split("\n")
    for loc, place in source.places.keys.items():
        at = lines[place.line - 1][place.column - 1 :]
        assert at.startswith((str(loc[-1]), "'", '"', "?"))


def test_places() -> None:
    spec = parse_spec(PAIR, file="demo.yaml")
    assert str(spec.position("agents", "solver")) == "demo.yaml:12:3"
    assert str(spec.position("rounds")) == "demo.yaml:3:9"
    assert str(spec.position("backbones", "small", "source")) == "demo.yaml:5:19"
    assert str(spec.position("links", "planner -> solver")) == "demo.yaml:16:3"
    # not written: the nearest thing around it
    assert str(spec.position("answer", "seed")) == "demo.yaml:18:1"
    assert str(spec.position("agents", "solver", "inner", "kind")) == "demo.yaml:12:3"
    assert str(spec.position("build", "target")) == "demo.yaml:1:1"


def test_an_anchor_may_be_given_again() -> None:
    source = parse_yaml("a: &x 1\nb: &x [&x 2, *x]\nc: *x\n", file="f")
    assert source.value == {"a": 1, "b": [2, 2], "c": [2, 2]}
    assert str(source.places.values["c",]) == "f:3:4"
    assert str(source.places.values["c", 1]) == "f:2:14"


def test_depth_counts_what_aliases_stand_for() -> None:
    deep = "a: &a " + "[" * 20 + "]" * 20 + "\nb: "
    assert parse_yaml(deep + "[" * 11 + "*a" + "]" * 11, file="f")
    with pytest.raises(RecmasError) as refused:
        parse_yaml(deep + "[" * 12 + "*a" + "]" * 12, file="f")
    problem = refused.value.problems[0]
    assert (problem.code, problem.line, problem.column) == ("RM101", 2, 16)
    assert "levels deep" in problem.message


MERGES = [
    "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n",
    "a: &a {x: 1, y: 2}\nb:\n  y: 3\n  <<: *a\n  z: 4\n",
    "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b], z: 3}\n",
    "a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, x: 5}\nd: {<<: [*b, *a]}\n",
    "b: {<<: {x: 1}, y: 2}\nc: {<<: [{x: 1}, {x: 2, z: 3}]}\n",
    "a: &a [{x: 1}, {y: 2}]\nb: {<<: *a}\n",
    "a: &a {in: {deep: [1, 2]}}\nb: {<<: *a}\nc: {<<: []}\n",
]


@pytest.mark.parametrize("text", MERGES)
def test_merge_keys_mean_what_yaml_1_1_says(text: str) -> None:
    source = parse_yaml(text, file="f")
    assert source.value == yaml.safe_load(text)
    assert source.problems == ()


def test_what_is_merged_has_the_place_where_it_is_written() -> None:
    source = parse_yaml("a: &a\n  x: 1\n  y: {z: 2}\nb:\n  <<: *a\n  x: 3\n", file="f")
    assert str(source.places.keys["b", "y"]) == "f:3:3"
    assert str(source.places.values["b", "y", "z"]) == "f:3:10"
    assert str(source.places.values["b", "x"]) == "f:6:6"
    broken = PAIR.replace("  solver:\n", "  solver:\n    <<: {late_steps: 3}\n", 1)
    with pytest.raises(RecmasError) as refused:
        parse_spec(broken, file="demo.yaml")
    (problem,) = refused.value.problems
    assert (problem.code, problem.line, problem.column) == ("RM103", 13, 10)


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("b: {<<: 1, x: 2}", "RM101", (1, 9)),
        ("b: {<<: , x: 2}", "RM101", (1, 9)),
        ("a: &a 5\nb:\n  x: 2\n  <<: [{y: 1}, *a]\n", "RM101", (4, 16)),
        ("b: {<<: {y: 1}, <<: {y: 2}, x: 2}", "RM102", (1, 17)),
        ("a: &a {y: 1, y: 2}\nb: {<<: *a, x: 2}", "RM102", (1, 14)),
    ],
)
def test_merges_that_cannot_be(text: str, code: str, place: tuple[int, int]) -> None:
    source = parse_yaml(text, file="f")
    found = [(p.code, (p.line, p.column)) for p in dict.fromkeys(source.problems)]
    assert found == [(code, place)]
    assert isinstance(source.value, dict)
    assert isinstance(source.value["b"], dict)
    assert source.value["b"]["x"] == 2


def test_a_quoted_merge_key_is_a_key() -> None:
    value: Value = {"<<": {"a": 1}}
    assert parse_yaml('"<<": {a: 1}', file="f").value == value
    assert parse_yaml(write_yaml({"<<": {"a": 1}}), file="f").value == value


def test_merges_count_what_aliases_stand_for() -> None:
    names = [f"a{number}" for number in range(31)]
    lines = ["a0: &a0 {" + ", ".join(f"k{number}: 0" for number in range(500)) + "}"]
    lines += [f"{n}: &{n} {{<<: [*{b}, *{b}]}}" for b, n in pairwise(names)]
    with pytest.raises(RecmasError, match="counting aliases each time"):
        parse_yaml("\n".join(lines), file="f")
    inside = "a: &a {b: &b {<<: *a}}"
    with pytest.raises(RecmasError, match="inside of its own anchor"):
        parse_yaml(inside, file="f")


PROMPTS = {
    "literal": "|\n      a {{ b }}\n        {{ c }} @@{% x %} {{ b }}\n",
    "second_of_two": "|\n      {{ a }} {{ a }}\n\n      {% y %}@@{% x %}\n",
    "folded": ">\n      one\n      two\n\n      three @@{% x %}\n",
    "plain": "one @@{% x %}\n",
    "plain_lines": "one\n      two @@{% x %}\n",
    "single_quotes": "'it''s @@{% x %}'\n",
    "double_quotes": '"caf\xe9 @@{% x %}"\n',
    "indented_block": "|2\n        deep @@{% x %}\n",
    "keep": "|+\n      one @@{% x %}\n\n\n",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_places_inside_of_text(name: str) -> None:
    sound = "Solve {{ question }} with {{ latent.planner }}\n"
    marked = PAIR.replace(sound, PROMPTS[name])
    before = marked[: marked.index("@@")]
    with pytest.raises(RecmasError) as refused:
        parse_spec(marked.replace("@@", ""))
    last = [p for p in refused.value.problems if "{% x %}" in p.message][-1]
    assert (last.line, last.column) == (
        before.count("\n") + 1,
        len(before) - before.rfind("\n"),
    )


def test_an_escaped_piece_is_placed_at_its_text() -> None:
    text = PAIR.replace("Solve {{ question }} with {{ latent.planner }}", '"\\u007B% x %}"')
    with pytest.raises(RecmasError) as refused:
        parse_spec(text)
    assert (refused.value.problems[0].line, refused.value.problems[0].column) == (14, 13)


def test_windows_line_ends_and_byte_order_mark() -> None:
    assert parse_spec("\ufeff" + PAIR.replace("\n", "\r\n")) == parse_spec(PAIR)
