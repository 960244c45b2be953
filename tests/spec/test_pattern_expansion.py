"""What each pattern and each task expands to, and that the expansion is a sound spec."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kit.specs import CHAIN
from recmas_compiler.spec.patterns.layouts import ROLES, TASKS
from recmas_compiler.spec.patterns.starter_specs import (
    STARTERS,
    TASK_NAMES,
    VARIANTS,
    starter_spec,
)
from recmas_compiler.spec.spec import Spec, parse_spec
from recmas_runtime.core.errors import RecmasError

PATTERNS = {
    "sequential": "sequential: [planner, critic, solver]",
    "alone": "sequential: [thinker]",
    "mixture": "mixture: {specialists: [math, code, science], summarizer: summarizer}",
    "distillation": "distillation: {expert: expert, learner: learner}",
    "deliberation": "deliberation: {reflector: reflector, caller: caller}",
}
TOOLS = """\
answer:
  tools:
    search: {backend: tavily}
    python: {}
    ask: true
    functions: [lookup]
"""


def spec_of(pattern: str, task: str = "general", more: str = "") -> Spec:
    written = f"{{{PATTERNS[pattern]}, task: {task}}}"
    return parse_spec(CHAIN.replace("{sequential: [planner, critic, solver]}", written) + more)


def shown(spec: Spec) -> str:
    """Return agents and links of a spec's expansion, and who answers."""
    text = spec.resolved_yaml()
    agents = text[text.index("agents:") : text.index("answer:")]
    forms = ("    inner:\n      kind: projected\n      init: aligned\n", "    kind: projected\n")
    for form in (*forms, "    init: aligned\n", "    backbone: small\n"):
        agents = agents.replace(form, "")
    return f"{agents}answer: {spec.document.answer.agent}\n"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern: str, golden: Callable[..., None]) -> None:
    golden(shown(spec_of(pattern)))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "general"])
def test_task(task: str, golden: Callable[..., None]) -> None:
    golden(shown(spec_of("mixture", task)))


def test_a_caller_is_told_how_to_call_its_tools(golden: Callable[..., None]) -> None:
    golden(shown(spec_of("deliberation", "search", TOOLS)))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_expansion_is_sound(pattern: str, task: str) -> None:
    spec = spec_of(pattern, task, TOOLS)
    assert spec.warnings == ()
    assert parse_spec(spec.resolved_yaml()) == spec
    for prompts in spec.declared.prompts.values():
        heads = [prompts.then] if prompts.first is None else [prompts.first, prompts.then]
        for prompt in heads:
            # the question first, so that most of a prompt is computed once
            fields = [part.value for part in prompt.parts if part.kind == "field"]
            assert fields == (["question", "choices"] if task == "choice" else ["question"])
            kinds = [part.kind for part in prompt.parts]
            if "slot" in kinds:
                assert kinds.index("slot") > max(i for i, k in enumerate(kinds) if k == "field")
        then = spec.document.agents
    for agent in then.values():
        # baselines leave out lines with a slot: there is one, and nothing else refers to it
        assert sum("latent." in line for line in agent.prompt.then.split("\n")) == 1
        assert agent.prompt.then.isascii()


def test_links_of_every_pattern() -> None:
    def links(pattern: str) -> set[str]:
        document = spec_of(pattern).document
        return {f"{'~' * link.feedback}{name}" for name, link in document.links.items()}

    assert links("mixture") == {
        "math -> summarizer",
        "code -> summarizer",
        "science -> summarizer",
        "~summarizer -> math",
        "~summarizer -> code",
        "~summarizer -> science",
    }
    assert links("distillation") == {"expert -> learner", "~learner -> expert"}
    assert links("deliberation") == {"reflector -> caller", "~caller -> reflector"}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_caches_come_before_prompts(pattern: str) -> None:
    written = f"{{{PATTERNS[pattern]}, carries: cache}}"
    spec = parse_spec(CHAIN.replace("{sequential: [planner, critic, solver]}", written))
    assert spec.warnings == ()
    assert {link.carries for link in spec.document.links.values()} == {"cache"}
    for name, agent in spec.document.agents.items():
        slots, _, asked = agent.prompt.then.partition("\n")
        senders = [ends for ends in spec.document.links if ends.endswith(f" -> {name}")]
        if senders:
            assert slots == " ".join(f"{{{{ latent.{ends.split(' ')[0]} }}}}" for ends in senders)
            assert agent.prompt.first in (None, asked)


def test_whoever_reads_rows_reads_those_before_them() -> None:
    spec = parse_spec(CHAIN.replace("critic, solver]", "critic, solver], carries: cache"))
    assert [name for name, link in spec.document.links.items() if not link.feedback] == [
        "planner -> critic",
        "planner -> solver",
        "critic -> solver",
    ]
    own = parse_spec(
        CHAIN.replace("critic, solver]", "critic, solver], carries: cache")
        + "links: {critic -> solver: {carries: text}}\n"
    )
    assert own.document.links["critic -> solver"].carries == "text"


def test_task_stands_beside_any_pattern() -> None:
    before = "{task: math, sequential: [planner, critic, solver]}"
    text = CHAIN.replace("{sequential: [planner, critic, solver]}", before)
    assert parse_spec(text) == spec_of("sequential", "math")
    assert spec_of("sequential", "math") != spec_of("sequential")


def test_tools_are_told_only_to_who_may_call_them() -> None:
    spec = spec_of("deliberation", more=TOOLS)
    assert "<search>" in spec.document.agents["caller"].prompt.then
    assert "<search>" not in spec.document.agents["reflector"].prompt.then
    only = TOOLS.replace("    search: {backend: tavily}\n", "").replace("    ask: true\n", "")
    prompt = spec_of("deliberation", more=only).document.agents["caller"].prompt.then
    assert "<python>" in prompt
    assert "<lookup>" in prompt
    assert "<search>" not in prompt
    assert "<ask>" not in prompt
    assert "tool" not in spec_of("deliberation").document.agents["caller"].prompt.then
    # whoever answers a pattern may have tools
    assert "<ask>" in spec_of("mixture", more=TOOLS).document.agents["summarizer"].prompt.then


def test_places_of_what_a_mixture_writes() -> None:
    spec = spec_of("mixture")
    assert str(spec.position("agents", "code")) == "<string>:4:41"
    assert str(spec.position("links", "code -> summarizer")) == "<string>:4:69"
    assert str(spec.position("links", "summarizer -> code")) == "<string>:4:41"


def test_what_is_written_out_wins_over_a_mixture() -> None:
    spec = spec_of(
        "mixture",
        more="""\
agents:
  code: {latent_steps: 3, system: You write programs.}
links:
  summarizer -> science: {kind: residual}
answer: {max_new_tokens: 9}
""",
    )
    document = spec.document
    assert list(document.agents) == ["math", "code", "science", "summarizer"]
    assert document.agents["code"].latent_steps == 3
    assert "{{ latent.summarizer }}" in document.agents["code"].prompt.then
    assert document.links["summarizer -> science"].feedback
    assert document.links["summarizer -> science"].kind == "residual"
    assert (document.answer.agent, document.answer.max_new_tokens) == ("summarizer", 9)


def test_every_role_has_its_place() -> None:
    """A prompt that no pattern uses is dead text."""
    used = {role for role, texts in ROLES.items() if _is_in_a_pattern(texts.thoughts)}
    assert used == set(ROLES)


def _is_in_a_pattern(thoughts: str) -> bool:
    said = thoughts.partition("$slots")[0]
    return any(said in spec_of(pattern).resolved_yaml() for pattern in PATTERNS)


@pytest.mark.parametrize("name", STARTERS)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_starters_take_a_task(name: str, task: str) -> None:
    if name in ("relay", "custom"):
        with pytest.raises(RecmasError, match=r"RM118.*takes no task"):
            starter_spec(name, task=task)
        return
    if name in VARIANTS:
        with pytest.raises(RecmasError, match=rf"RM118.*`{name}` has no task"):
            starter_spec(name, task=task)
        return
    text = starter_spec(name, task=task)
    assert parse_spec(text).warnings == ()
    assert TASKS[task].question.split(":")[0] in parse_spec(text).resolved_yaml()
    assert f"task: {task}" in text
    assert [line.index("#") for line in text.split("\n") if "task:" in line] == [26]


def test_unknown_task() -> None:
    with pytest.raises(RecmasError, match=r"RM118.*Did you mean `choice`"):
        starter_spec("mixture", task="choices")
