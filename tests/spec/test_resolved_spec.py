"""The resolved spec loads back to an equal spec; any text is a spec or a RecmasError."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kit.specs import CHAIN, PAIR
from recmas_compiler.spec.patterns.starter_specs import STARTERS, starter_spec
from recmas_compiler.spec.schema.document import SECTIONS, SpecDocument
from recmas_compiler.spec.spec import parse_spec, resolved_yaml
from recmas_runtime.core.errors import Problem, RecmasError

WORDS = st.text(alphabet="ab c\n\t'\"#:-{}[]|>&*!%@`,?\\\u00e9\u2028\U0001f600", max_size=20)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True)


@st.composite
def chains(draw: st.DrawFn) -> dict[str, object]:
    """A sound document: a chain of agents with any texts and settings."""
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    agents = {}
    for i, name in enumerate(names):
        before, after = (draw(WORDS).replace("{", "(") for _ in range(2))
        slot = f"{{{{ latent.{names[i - 1]} }}}}" if i else ""
        agent: dict[str, object] = {
            "backbone": draw(st.just("b")),
            "prompt": f"{before}{{{{ question }}}}{slot}{after}",
            "system": draw(WORDS).replace("{", "("),
            "chat_template": draw(
                st.dictionaries(
                    st.sampled_from(["thinking", "on", "year"]),
                    st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | WORDS,
                )
            ),
        }
        if draw(st.booleans()):
            agent["latent_steps"] = draw(st.integers(0, 8))
        if draw(st.booleans()):
            agent["inner"] = {"weights": draw(st.sampled_from(["a b.safetensors", "../x: y"]))}
        agents[name] = agent
    links = {
        f"{a} -> {b}": draw(st.sampled_from([{}, {"kind": "residual"}, {"init": "random"}]))
        for a, b in pairwise(names)
    }
    return {
        "recmas": 1,
        "name": draw(NAMES),
        "rounds": draw(st.integers(1, 64)),
        "backbones": {"b": {"source": draw(st.sampled_from(["builtin:x", "./a b", "no", "1"]))}},
        "agents": agents,
        "links": links,
        "answer": {
            "agent": names[-1],
            "temperature": draw(st.floats(0, 10)),
            "stop": draw(st.lists(WORDS.filter(bool), max_size=3)),
        },
    }


@settings(deadline=None)
@given(chains())
def test_round_trip(values: dict[str, object]) -> None:
    document = SpecDocument.model_validate(values)
    text = resolved_yaml(document)
    spec = parse_spec(text)
    assert spec.document == document
    assert spec.resolved_yaml() == text
    assert len(spec.digest) == 64


@pytest.mark.parametrize("name", STARTERS)
def test_starters_round_trip(name: str) -> None:
    spec = parse_spec(starter_spec(name))
    again = parse_spec(spec.resolved_yaml())
    assert again == spec
    assert again.digest == spec.digest


def test_expansion(golden: Callable[..., None]) -> None:
    golden(parse_spec(CHAIN).resolved_yaml())


def test_expansion_of_one_agent(golden: Callable[..., None]) -> None:
    golden(parse_spec(CHAIN.replace("planner, critic, solver", "alone")).resolved_yaml())


def test_equal_meaning_gives_equal_text() -> None:
    other = PAIR.replace("planner -> solver: {}", "planner->solver:").replace(
        "answer: {agent: solver}", "answer:\n  agent: solver  # it writes\n  seed: 0x0"
    )
    assert parse_spec(other) == parse_spec(PAIR)
    assert parse_spec(other).digest == parse_spec(PAIR).digest


LINES = [line for line in (PAIR + CHAIN + starter_spec("custom")).split("\n") if line.strip()]
PIECES = [
    ": ",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "|",
    ">",
    "&a",
    "*a",
    "!x",
    "#",
    "---",
    "~",
    "->",
]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A sound spec with some characters and lines changed."""
    text = draw(st.sampled_from([PAIR, CHAIN, starter_spec("custom")]))
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(text)))
        j = min(len(text), i + draw(st.integers(0, 6)))
        new = draw(st.sampled_from(PIECES + LINES) | st.text(max_size=4))
        text = text[:i] + new + text[j:]
    return text


# YAML 1.1 has more line breaks than editors do (section 5.4).
YAML_BREAKS = ("\n", "\r", "\x85", "\u2028", "\u2029")


@settings(deadline=None)
@given(st.one_of(mutated(), st.text(), st.lists(st.sampled_from(LINES)).map("\n".join)))
@example("")
@example("\x00")
@example("a: &a [*a]")
@example("? {}\n: 1")
@example("- " * 5000)
@example("[" * 5000)
@example("recmas: 1\nlinks: {a -> a: ~}\nagents: {a: ~}\nanswer: []\npattern: {sequential: [a]}")
@example("recmas: 0x" + "f" * 5000)
def test_any_text_is_a_spec_or_a_clean_error(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        spec = parse_spec(text)
        assert parse_spec(spec.resolved_yaml()) == spec
    except RecmasError as error:
        problems = error.problems
    for problem in problems:
        assert problem.code.startswith("RM1")
        assert problem.file == "<string>"
        assert problem.line is not None
        assert 1 <= problem.line <= sum(map(text.count, YAML_BREAKS)) + 2


@settings(deadline=None)
@given(st.text(max_size=30) | st.sampled_from(["rounds=3", "agents=", "links.a->b={}", "a.b.c=[1"]))
def test_any_override_is_taken_or_a_clean_error(override: str) -> None:
    codes = {"RM1"}
    try:
        parse_spec(PAIR, overrides=[override])
    except RecmasError as error:
        codes |= {problem.code[:3] for problem in error.problems}
    assert codes == {"RM1"}


def test_every_section_is_in_the_table() -> None:
    names = {section.__name__ for section in SECTIONS.values()}
    assert names == set(SpecDocument.model_json_schema()["$defs"]) | {"SpecDocument"}
