"""The whole text of the messages that users see most."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kit.specs import CHAIN, PAIR
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError

# name: (piece of PAIR, what stands there instead)
EDITS: dict[str, tuple[tuple[str, str], ...]] = {
    "unknown_key": (("rounds: 2", "round: 2"),),
    "key_of_another_section": (("rounds: 2", "rounds: 2\ntop_p: 0.9"),),
    "wrong_types": (
        ("rounds: 2", "rounds: two\nlatent_steps: 1.5"),
        ("{agent: solver}", "{agent: solver, stop: end, temperature: hot, seed: true}"),
        ("{feedback: true}", "{feedback: yes}"),
        ("name: demo", "name: 12"),
    ),
    "out_of_bounds": (
        ("rounds: 2", "rounds: 100"),
        ("{agent: solver}", "{agent: solver, top_p: 0, temperature: .nan, max_new_tokens: -5}"),
    ),
    "unknown_names": (
        ("  solver:\n    backbone: small", "  solver:\n    backbone: smol"),
        ("{agent: solver}", "{agent: writer}"),
        ("  planner -> solver", "  planer -> solver"),
    ),
    "slots_and_links": (
        ("with {{ latent.planner }}", "with {{ latent.solver }}"),
        ("answer:", "  solver - planner: {}\nanswer:"),
    ),
    "cycle": (
        ("{feedback: true}", "{}"),
        ("      first: Plan {{ question }}\n", ""),
    ),
    "no_first": (("      first: Plan {{ question }}\n", ""),),
    "prompt_logic": (
        (
            "Solve {{ question }}",
            "Do {% if x %}it{% endif %} {{ question | trim }} {{ latent }}",
        ),
        ("first: Plan {{ question }}", "first: |\n        Plan {# do it #}\n        {{ question"),
    ),
    "not_supported": (("answer:", "build: {target: tensorrt, precision: int4}\nanswer:"),),
    "precision_not_supported": (
        ("{source: ./small}", "{source: ./small, device: cpu}"),
        ("answer:", "build: {precision: bfloat16}\nanswer:"),
    ),
    "newer_version": (("recmas: 1", "recmas: 2\nthoughts: deep"),),
    "unquoted_prompt": (("prompt: Solve {{ question }}", "prompt: {{ question }}"),),
    "logic_as_yaml": (("Solve {{ question }}", "{% if x %}Solve{% endif %}"),),
    "colon_in_value": (("name: demo", "name: demo: one"),),
    "tag": (("rounds: 2", "rounds: !!python/name:os.system 2"),),
    "duplicates": (
        ("rounds: 2", "rounds: 2\nrounds: 3"),
        ("answer:", "  planner  ->  solver: {}\nanswer:"),
    ),
    "missing_keys": (("name: demo\n", ""), ("answer: {agent: solver}\n", "answer: {}\n")),
    "unused": (
        ("agents:\n", "  big: {source: ./big}\nagents:\n"),
        ("links:\n", "  idle: {backbone: small, prompt: Hm}\nlinks:\n"),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_errors(name: str, golden: Callable[..., None]) -> None:
    text = PAIR
    for piece, other in EDITS[name]:
        assert text.count(piece) == 1, piece
        text = text.replace(piece, other)
    golden(refusal(text))


def test_overrides(golden: Callable[..., None]) -> None:
    overrides = [
        "round=3",
        "rounds=many",
        "answer.temperature=99",
        "answer.agent.name=x",
        "links.planner->solver.feedback=",
        "answer.stop=[a",
        "noequals",
    ]
    golden(refusal(PAIR, overrides))


def test_patterns(golden: Callable[..., None]) -> None:
    two = CHAIN + "  big: {source: ./big}\n"
    others = (
        "{mixtur: {specialists: [a], summarizer: b}}",
        "{task: math}",
        "{sequential: [a], distillation: {expert: b, learner: c}}",
        "{mixture: [a, b]}",
        "{mixture: {specialists: [a, b], summariser: c}, task: maths}",
        "{deliberation: {reflector: a, caller: a}}",
    )
    chain = "{sequential: [planner, critic, solver]}"
    golden("".join(refusal(text) for text in (two, *(CHAIN.replace(chain, p) for p in others))))


def test_stop_and_tools(golden: Callable[..., None]) -> None:
    answers = (
        "{agent: solver, stop_when: {cosine: 1.5}, tools: {ask: maybe, max_call: 3}}",
        "{agent: solver, stop_when: {}, tools: {max_calls: 3}}",
        "{agent: solver, tools: {search: {corpus: a, backend: tavily}, functions: [a, python, a]}}",
    )
    golden("".join(refusal(PAIR.replace("{agent: solver}", answer)) for answer in answers))


def test_empty(golden: Callable[..., None]) -> None:
    golden(refusal("# nothing yet\n"))


def test_warnings(golden: Callable[..., None]) -> None:
    text = """\
recmas: 1
name: careless
rounds: 2
backbones:
  small: {source: ./small}
agents:
  planner:
    backbone: small
    inner: {kind: ln_residual, init: random}
    prompt: "Plan {{ question }}"
  critic:
    backbone: small
    prompt: |
      What do you think of {{ latent.planner }} as a plan for the following problem?
      {{ question }}
      Choose from {{ choices }}.
  late:
    backbone: small
    prompt:
      first: "{{ question }}"
      then: "{{ question }} {{ latent.solver }}"
  solver:
    backbone: small
    prompt:
      first: "{{ question }} {{ latent.planner }}"
      then: "{{ question }} {{ latent.planner }}"
links:
  planner -> critic: {}
  planner -> solver: {kind: residual, init: random}
  solver -> late: {feedback: true}
answer: {agent: solver}
"""
    golden("".join(f"{warning}\n" for warning in parse_spec(text, file="spec.yaml").warnings))


def refusal(text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecmasError) as refused:
        parse_spec(text, file="spec.yaml", overrides=overrides or [])
    return f"{refused.value}\n"
