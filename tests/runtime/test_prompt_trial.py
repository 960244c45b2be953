"""Prompts rendered once with placeholders: what a template does to them is known before a run."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest

from recmas_runtime.formats.plan import AgentPlan, PromptPart
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.trial import PromptFinding, render_once


def text(value: str) -> PromptPart:
    return PromptPart(kind="text", value=value)


QUESTION = PromptPart(kind="field", value="question")
PLAN = PromptPart(kind="slot", value="planner")
ASKED = (QUESTION, text(" Plan: "), PLAN, text(" Solve it."))
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# In the manner of Gemma: no such role.
REFUSES = """{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for m in messages %}{{ m.content | trim }}{% endfor %}"""


def findings(
    template: str,
    *,
    system: Sequence[PromptPart] = (),
    first: Sequence[PromptPart] | None = None,
    then: Sequence[PromptPart] = ASKED,
    has_date: bool = True,
    targets: Sequence[str] = (),
    variables: dict[str, bool | int | float | str] | None = None,
) -> list[PromptFinding]:
    agent = AgentPlan(
        backbone="base",
        system=tuple(system),
        first=None if first is None else tuple(first),
        then=tuple(then),
        inner="solver.inner",
        latent_steps=2,
        chat_template=variables or {},
    )
    templates = {"base": ChatTemplate(template)}
    return list(render_once({"solver": agent}, templates, has_date=has_date, targets=targets))


@pytest.mark.parametrize("template", [PLAIN, REFUSES, "{{ messages[0].content }}"])
def test_a_template_that_writes_everything_is_right(template: str) -> None:
    assert findings(template, first=[QUESTION]) == []


def test_a_backbone_whose_template_is_not_at_hand_is_left_out() -> None:
    agent = AgentPlan(
        backbone="other", system=(), first=None, then=ASKED, inner="a.inner", latent_steps=0
    )
    assert list(render_once({"a": agent}, {}, has_date=False)) == []


def test_a_refused_system_text_is_told_of_as_such() -> None:
    (finding,) = findings(REFUSES, system=[text("Be brief.")])
    assert (finding.agent, finding.place) == ("solver", "system")
    assert finding.problem.code == "RM206"
    assert "no system role" in finding.problem.message
    assert finding.problem.hint.startswith("Without a system text it renders")


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ("{{ messages[-1].role }}", "the field 'question', the message of 'planner' and the end"),
        ("{{ messages[-1].content[:500] }}", "the field 'question', the message of 'planner'"),
        ("{{ messages[-1].content | truncate(900) }}", "the field 'question'"),
        ("{{ messages[-1].content[:-9] }}", "the end of the prompt"),
        ("{{ messages[-1].content | upper }}", "or changes what is there"),
        ("{{ messages[-1].content.split('Plan:')[0] }}", "the message of 'planner' and the end"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for m in messages %}{{ m.content.nothing.more }}{% endfor %}", "the chat template"),
    ],
)
def test_what_a_template_leaves_out_is_named(template: str, lost: str) -> None:
    (finding,) = findings(template)
    assert (finding.place, finding.problem.code) == ("then", "RM206")
    assert lost in finding.problem.message


def test_a_system_text_that_is_left_out_is_told_of() -> None:
    (finding,) = findings("{{ messages[-1].content }}", system=[text("Be brief.")])
    assert finding.place == "system"
    assert "leaves out the system text" in finding.problem.message


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content }}{{ messages[0].content }}", "{{ messages[0].content | reverse }}"],
)
def test_messages_stand_once_and_in_order(template: str) -> None:
    (finding,) = findings(template)
    assert finding.problem.code == "RM206"


def test_a_field_may_stand_twice() -> None:
    template = "{{ messages[0].content }}{{ messages[0].content }}"
    assert findings(template, then=[QUESTION]) == []


def test_both_prompts_of_an_agent_are_rendered() -> None:
    template = "{% if 'first' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + PLAIN
    (finding,) = findings(template, first=[text("the first "), QUESTION])
    assert finding.place == "first"


def test_turns_are_rendered_where_they_are_trained_on() -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    assert findings(template) == []
    (finding,) = findings(template, targets=["solver"])
    assert "leaves out the assistant's text" in finding.problem.message
    cut = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else m.content[:99] }}{% endfor %}"
    )
    assert findings(cut, targets=["solver"]) == []  # trained whole, with a warning then


# Templates that write the date

LLAMA = (
    """{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}\
{% endif %}Today: {{ date_string }}
"""
    + PLAIN
)


def test_an_open_date_is_told_of_with_its_variable() -> None:
    (finding,) = findings(LLAMA, has_date=False)
    problem = finding.problem
    assert (finding.place, problem.code, problem.severity) == ("backbone", "RM155", "warning")
    assert "(date_string)" in problem.message
    assert "`date: YYYY-MM-DD`" in problem.hint
    assert "chat_template: {date_string: ...}" in problem.hint
    (bare,) = findings("{{ strftime_now('%Y') }}" + PLAIN, has_date=False)
    assert "(strftime_now)" in bare.problem.message


@pytest.mark.parametrize(
    ("template", "has_date", "variables"),
    [
        (LLAMA, True, {}),
        (LLAMA, False, {"date_string": "26 Jul 2024"}),
        (PLAIN, False, {}),
        ("{% if false %}{{ strftime_now('%Y') }}{% endif %}" + PLAIN, False, {}),
    ],
)
def test_a_date_that_is_fixed_or_not_written_is_no_matter(
    template: str, has_date: bool, variables: dict[str, bool | int | float | str]
) -> None:
    assert findings(template, has_date=has_date, variables=variables) == []


def test_templates_get_the_day_they_are_given() -> None:
    day = datetime.date(2024, 2, 29)
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M') }}", day=day)
    assert template.render([], add_generation_prompt=True) == "2024-02-29 00:00"
    today = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")
    assert today.render([], add_generation_prompt=True) == today.day.isoformat()
