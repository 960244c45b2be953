"""`serve`: which part of a conversation becomes which field, from the spec to the bundle's plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.specs import PAIR, at, write_config
from recmas_compiler.analysis.explain import explain
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.lowering.prompt_trial import check_prompts
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.patterns.starter_specs import STARTERS, starter_spec
from recmas_compiler.spec.spec import Spec, load_spec, parse_spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.plan import Plan, ServePlan
from recmas_runtime.prompts.chat_template import ChatTemplate

SPECS = Path(__file__).parents[2] / "specs"
FIELDS = ("Plan {{ question }} again", "Plan {{ context }} {{ facts[0] }} {{ history }} again")


@dataclass(frozen=True)
class Case:
    """What `serve` says, what is wrong with it, and what to do; `@@` marks the place."""

    serve: str
    message: str
    hint: str
    code: str = "RM128"


CASES = {
    "unknown_field": Case(
        "{@@contxt: last_user}", "no prompt shows a field `contxt`.", "Did you mean `context`?"
    ),
    "no_name": Case(
        '{@@"facts[0]": last_user}',
        "no prompt shows a field `facts[0]`.",
        "Did you mean `facts`?",
    ),
    "list": Case(
        "{question: last_user, @@facts: system}",
        "`facts` is a list, as a prompt shows `facts[0]`, and messages are text.",
        "Take another field, or show `{{ facts }}`.",
    ),
    "two_questions": Case(
        "{question: last_user, @@context: last_user}",
        "`question` and `context` both take `last_user`.",
        "Keep one of them.",
    ),
    "two_systems": Case(
        "{context: system, history: @@system}",
        "`serve.history` should be 'transcript', 'turns' or 'refuse', is \"system\".",
        "`history` is a setting here: a field that takes a part of a conversation needs another "
        "name.",
        code="RM105",
    ),
    "no_question": Case(
        "{question: system}", "no field takes the last user message.", "Add `context: last_user`."
    ),
    "wrong_part": Case(
        "{question: @@last}",
        "`serve.question` should be 'last_user' or 'system', is \"last\".",
        "Did you mean `last_user`?",
        code="RM105",
    ),
    "history_of_a_field": Case(
        "{question: @@transcript}",
        "`serve.question` should be 'last_user' or 'system', is \"transcript\".",
        "Write `history: transcript`.",
        code="RM105",
    ),
    "wrong_history": Case(
        "{history: @@turn}",
        "`serve.history` should be 'transcript', 'turns' or 'refuse', is \"turn\".",
        "Did you mean `turns`?",
        code="RM105",
    ),
    "list_of_parts": Case(
        "{question: @@[last_user]}",
        "`serve.question` should be 'last_user' or 'system', is a list.",
        "",
        code="RM105",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_at_its_place(name: str) -> None:
    case = CASES[name]
    text = PAIR.replace(*FIELDS).replace("answer:", f"serve: {case.serve}\nanswer:")
    before = text.partition("@@" if "@@" in text else "serve:")[0]
    place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
    with pytest.raises(RecmasError) as refused:
        parse_spec(text.replace("@@", ""), file="spec.yaml")
    (problem,) = refused.value.problems
    assert at(problem) == (case.code, *place)
    assert (problem.message, problem.hint or "") == (case.message, case.hint)


def written(tmp_path: Path, serve: str, *overrides: str, text: str = PAIR) -> Spec:
    write_config(tmp_path / "small")
    whole = text.replace("answer:", f"serve: {serve}\nanswer:") if serve else text
    return parse_spec(whole, base_dir=tmp_path, overrides=overrides)


def plan_of(spec: Spec) -> Plan:
    return build_plan(run_pipeline(build_topology(spec)))


SHOWN = PAIR.replace("Solve {{", "Solve {{ system }} {{ facts[1] }} {{")


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        ("{}", ServePlan(fields={"question": "last_user"})),
        ("{history: refuse}", ServePlan(fields={"question": "last_user"}, history="refuse")),
        (
            "{system: system, history: turns}",
            ServePlan(fields={"question": "last_user", "system": "system"}, history="turns"),
        ),
        (
            "{system: last_user, question: system}",
            ServePlan(fields={"system": "last_user", "question": "system"}),
        ),
    ],
)
def test_it_lands_in_the_plan(tmp_path: Path, serve: str, expected: ServePlan) -> None:
    spec = written(tmp_path, serve, text=SHOWN)
    assert spec.warnings == ()
    assert plan_of(spec).conversation == expected
    again = parse_spec(spec.resolved_yaml(), base_dir=tmp_path)
    assert again == spec
    assert again.digest == spec.digest != written(tmp_path, "", text=SHOWN).digest


def test_without_it_the_usual_field_takes_the_question(tmp_path: Path) -> None:
    plan = plan_of(written(tmp_path, ""))
    assert plan.serve is None
    assert plan.conversation == ServePlan(fields={"question": "last_user"})
    other = plan_of(written(tmp_path, "", text=PAIR.replace("question", "claim")))
    assert other.conversation == ServePlan(fields={"claim": "last_user"})


def test_the_command_line_sets_it(tmp_path: Path) -> None:
    spec = written(tmp_path, "", "serve.history=turns", "serve.system=system", text=SHOWN)
    expected = ServePlan(fields={"question": "last_user", "system": "system"}, history="turns")
    assert plan_of(spec).conversation == expected
    with pytest.raises(RecmasError, match="RM128") as refused:
        written(tmp_path, "", "serve.sytem=system", text=SHOWN)
    (problem,) = refused.value.problems
    assert (problem.file, problem.hint) == ("--set serve.sytem=system", "Did you mean `system`?")


def test_it_is_printed_and_explained(tmp_path: Path) -> None:
    topology = build_topology(written(tmp_path, "{system: system, history: turns}", text=SHOWN))
    assert "serve   question=last_user system=system history=turns" in print_graph(topology)
    assert (
        "In a conversation the last message is 'question'; the text of system messages is "
        "'system'; what came before are turns in front of the answer agent's prompt; every "
        "request brings 'facts' under recmas.record." in explain(topology, [])
    )


def findings(spec: Spec, template: str) -> list[Problem]:
    system = build_topology(spec).system
    return check_prompts(spec, system, {"small": ChatTemplate(template)})


def test_turns_need_a_template_that_writes_them(tmp_path: Path) -> None:
    last = "{{ messages[-1].content }}"
    spec = written(tmp_path, "{history: turns}")
    assert findings(spec, "{% for m in messages %}{{ m.content }}{% endfor %}") == []
    assert findings(written(tmp_path, "{history: transcript}"), last) == []
    (problem,) = findings(spec, last)
    assert (problem.code, problem.line, problem.column) == ("RM206", 18, 9)
    assert problem.message == (
        "agent `solver`: the chat template leaves out the earlier turns of a conversation, or "
        "their order."
    )
    assert (problem.hint or "").startswith("Take `history: transcript`")


@pytest.mark.parametrize("name", [*STARTERS, *(path.name for path in sorted(SPECS.glob("*.yaml")))])
def test_what_ships_answers_conversations(name: str) -> None:
    """Without a section; only what needs a second text must get it with each request."""
    spec = load_spec(SPECS / name) if "." in name else parse_spec(starter_spec(name))
    shown = [
        part.value
        for prompts in spec.declared.prompts.values()
        for _, prompt in prompts.fields()
        for part in prompt.parts
        if part.kind == "field"
    ]
    assert spec.document.serve is None
    assert "question" in shown
    others = ServePlan(fields={"question": "last_user"}).others(shown)
    assert others == {"split": ("context",), "relay": ("note",)}.get(name, ())
