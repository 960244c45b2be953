"""Every prompt rendered once with words in place of fields and messages: what would fail later.

It needs no tokenizer, so that a spec can be checked with a template alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.text import listed
from recmas_runtime.formats.plan import AgentPlan, PromptPart, ToolsPlan
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.marks import Marks, unused_salt
from recmas_runtime.prompts.render import DEFAULT_VARIABLES, messages_of
from recmas_runtime.prompts.tool_turns import template_of
from recmas_runtime.prompts.turn import turn_text

# Templates that shorten texts leave out the end of a long one.
_FILLER: Final = "some text " * 200

Place = Literal["system", "first", "then", "backbone", "history"]


_NO_TURNS: Final = Problem(
    code="RM206",
    message="the chat template leaves out the earlier turns of a conversation, or their order",
    hint="Take `history: transcript`, or give the backbone a `template` of your own.",
)


@dataclass(frozen=True, kw_only=True)
class PromptFinding:
    """What is wrong with a text of an agent: an error, or a warning about a date that is open."""

    agent: str
    place: Place
    problem: Problem


def render_once(
    agents: Mapping[str, AgentPlan],
    templates: Mapping[str, ChatTemplate],
    *,
    has_date: bool,
    targets: Collection[str] = (),
    answer_agent: str | None = None,
    tools: ToolsPlan | None = None,
    has_turns: bool = False,
) -> Iterator[PromptFinding]:
    """Render every agent's prompts; yield what fails, is left out, shortened, or changes by day.

    Args:
        templates: By backbone. Agents whose backbone has none here are skipped.
        has_date: Whether the day that templates get is fixed.
        targets: Agents whose turns are rendered too, as training reads them.
        answer_agent: The one that gets the tools, where its template writes some.
        has_turns: Whether earlier turns of conversations come before its prompt.
    """
    dated: set[str] = set()
    for name, agent in agents.items():
        template = templates.get(agent.backbone)
        if template is None:
            continue
        if name == answer_agent:
            template = template_of(template, tools, agent.chat_template)
            if has_turns and not template.writes_turns:
                yield PromptFinding(agent=name, place="history", problem=_NO_TURNS)
        yield from _failures(name, agent, template, is_target=name in targets)
        if not has_date and agent.backbone not in dated:
            for problem in _open_date(agent, template):
                dated.add(agent.backbone)
                yield PromptFinding(agent=name, place="backbone", problem=problem)


def _failures(
    name: str, agent: AgentPlan, template: ChatTemplate, *, is_target: bool
) -> Iterator[PromptFinding]:
    variants: list[tuple[Place, Sequence[PromptPart]]] = [("then", agent.then)]
    if agent.first is not None:
        variants.insert(0, ("first", agent.first))
    for place, parts in variants:
        try:
            _try(agent, agent.system, parts, template, is_target=is_target)
        except RecmasError as error:
            if agent.system and _passes(agent, parts, template, is_target=is_target):
                yield PromptFinding(agent=name, place="system", problem=_about_system(error))
                return
            (problem,) = error.problems
            yield PromptFinding(agent=name, place=place, problem=problem)


def _passes(
    agent: AgentPlan, parts: Sequence[PromptPart], template: ChatTemplate, *, is_target: bool
) -> bool:
    """Tell whether a prompt renders without the system text."""
    try:
        _try(agent, (), parts, template, is_target=is_target)
    except RecmasError:
        return False
    return True


def _about_system(error: RecmasError) -> Problem:
    (problem,) = error.problems
    hint = (
        "Without a system text it renders: move that into the prompt, or give the backbone a "
        "`template` of your own."
    )
    return replace(problem, hint=hint)


def _try(
    agent: AgentPlan,
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    template: ChatTemplate,
    *,
    is_target: bool,
) -> None:
    """Raise RM206 unless the template writes all that it is given."""
    written = "".join(part.value for part in (*system, *prompt) if part.kind == "text")
    marks = Marks(unused_salt(written, template.literals))
    messages = messages_of(
        _marked(system, marks, "system text"), _marked(prompt, marks, "prompt"), template
    )
    variables = {**DEFAULT_VARIABLES, **agent.chat_template}
    rendered = template.render(messages, add_generation_prompt=True, **variables)
    found = [int(number) for number in marks.slot_pattern.findall(rendered)]
    if lost := [what for number, what in enumerate(marks.slots) if number not in found]:
        raise fail(
            "RM206",
            f"the chat template leaves out {listed(dict.fromkeys(lost))}, or changes what is there",
            hint="It must write every message's text as it is: give the backbone a `template` of "
            "your own.",
        )
    slots = [number for number in found if marks.slots[number].startswith(_SLOT)]
    if slots != sorted(set(slots)):
        raise fail(
            "RM206",
            "the chat template repeats messages, or changes their order",
            hint="It must write every message's text once, in order: give the backbone a "
            "`template` of your own.",
        )
    if is_target:
        turn_text(messages, f"{_FILLER}{marks.salt}", template, marks, variables, None)


_SLOT: Final = "the message of "


def _marked(parts: Sequence[PromptPart], marks: Marks, what: str) -> str:
    """Return a text with long words for fields, and one behind its end; empty if it is empty."""
    pieces = []
    for part in parts:
        match part.kind:
            case "text":
                pieces.append(part.value)
            case "field":
                pieces.append(_FILLER + marks.for_slot(f"the field {part.value!r}"))
            case "slot":
                pieces.append(marks.for_slot(f"{_SLOT}{part.value!r}"))
    return "".join((*pieces, marks.for_slot(f"the end of the {what}"))) if pieces else ""


def _open_date(agent: AgentPlan, template: ChatTemplate) -> Iterator[Problem]:
    """Yield a warning if what the template writes depends on the day."""
    messages = [{"role": "user", "content": "Hello"}]
    try:
        if agent.system and template.writes_system_text:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        if not template.changes_with_the_day(
            messages, **{**DEFAULT_VARIABLES, **agent.chat_template}
        ):
            return
    except RecmasError:
        return  # which is told where the prompts are rendered
    names = template.date_variables
    setting = f", or `chat_template: {{{names[0]}: ...}}` of its agents" if names else ""
    yield Problem(
        code="RM155",
        severity="warning",
        message=f"the chat template of backbone {agent.backbone!r} writes the date of the day "
        f"({listed(names) if names else 'strftime_now'}), so prompts change from day to day",
        hint=f"Fix it: set `date: YYYY-MM-DD` in the spec{setting}.",
    )
