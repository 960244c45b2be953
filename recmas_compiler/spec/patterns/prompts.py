"""The wording of patterns: what each role is asked, and how each task wants its answer.

A prompt is the question, what the role is to do, one line with the slots, and for the agent that
answers the form of the answer. Round 1 leaves the line with the slots out where nothing was sent
yet. So everything before the slots is the same in every round and computed once. Sentences are
short and plain, for small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Final, Literal

from recmas_compiler.spec.schema.answer import ToolsSection
from recmas_compiler.spec.schema.pattern import Task

RoleName = Literal[
    "plan",
    "review",
    "solve",
    "alone",
    "specialist",
    "summarize",
    "expert",
    "learner",
    "reflect",
    "call",
]


@dataclass(frozen=True, kw_only=True)
class TaskTexts:
    """What the prompts of a task have of their own.

    Attributes:
        question: How the record is shown; begins every prompt.
        aim: What to think about.
        answer: What to write, and where the answer stands in it.
    """

    question: str
    aim: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class RoleTexts:
    """What the prompts of a role have of their own.

    Attributes:
        ask: What the agent is to do; `$aim` is the task's, `$agent` the agent's name.
        thoughts: Says what `$slots` are.
        answers: Whether the task's answer is asked for.
    """

    ask: str = ""
    thoughts: str
    answers: bool = False


TASKS: Final[dict[Task, TaskTexts]] = {
    "general": TaskTexts(
        question="Question: {{ question }}",
        aim="which steps lead to the answer",
        answer="Solve the question step by step, then write the answer in the last line.",
    ),
    "math": TaskTexts(
        question="Problem: {{ question }}",
        aim="what is given, what is asked and which calculations connect the two",
        answer="Solve the problem step by step. End with the final number in \\boxed{}.",
    ),
    "choice": TaskTexts(
        question="Question: {{ question }}\n{{ choices }}",
        aim="what speaks for and against each choice",
        answer="Decide which choice is right. The last line must be its letter and nothing else.",
    ),
    "code": TaskTexts(
        question="Task: {{ question }}",
        aim="which inputs there can be, which cases are special and which algorithm fits",
        answer="Write the whole program in one block that begins with ```python and ends with ```.",
    ),
    "search": TaskTexts(
        question="Question: {{ question }}",
        aim="which facts lead to the answer, and in which order to find them",
        answer="Put the facts together. The last line must be the short answer and nothing else.",
    ),
}

ROLES: Final[dict[RoleName, RoleTexts]] = {
    "plan": RoleTexts(
        ask="Think about $aim. Do not answer yet.",
        thoughts="Correct what the last attempt got wrong: $slots",
    ),
    "review": RoleTexts(
        ask="Think about $aim. Do not answer yet.",
        thoughts="Check every step of these thoughts and correct what is wrong: $slots",
    ),
    "solve": RoleTexts(thoughts="Thoughts on how to solve it: $slots", answers=True),
    "alone": RoleTexts(thoughts="Your thoughts so far: $slots", answers=True),
    "specialist": RoleTexts(
        ask="You are a specialist in $agent. Think about $aim. Do not answer yet.",
        thoughts="Correct what the last attempt of the group got wrong: $slots",
    ),
    "summarize": RoleTexts(
        thoughts="Thoughts of specialists, to be weighed against each other: $slots", answers=True
    ),
    "expert": RoleTexts(
        ask="Think carefully about $aim, so that a learner can follow. Do not answer yet.",
        thoughts="Correct what the learner's last attempt got wrong: $slots",
    ),
    "learner": RoleTexts(thoughts="Thoughts of an expert: $slots", answers=True),
    "reflect": RoleTexts(
        ask="Think about $aim. Tell apart what is known and what is missing. Do not answer yet.",
        thoughts="Reflect on the last attempt, on what it found and what it got wrong: $slots",
    ),
    "call": RoleTexts(thoughts="Thoughts on what to do: $slots", answers=True),
}

_CALLS: Final = (
    "You may use tools. Write a call in this form, and its result follows between <result> and "
    "</result>:"
)


def role_prompts(
    role: RoleName, task: Task, *, agent: str, senders: Sequence[str], tools: ToolsSection | None
) -> tuple[str, str]:
    """Return what an agent is asked without and with slots.

    Args:
        role: Its part in the pattern.
        task: What the answer is to look like.
        agent: Its name.
        senders: The agents whose messages it has slots for; several are named in the text.
        tools: What it may call, if it answers.
    """
    asked, wanted = ROLES[role], TASKS[task]
    slots = [f"{{{{ latent.{sender} }}}}" for sender in senders]
    if len(senders) > 1:
        slots = [f"{sender} {slot}" for sender, slot in zip(senders, slots, strict=True)]
    names = {"aim": wanted.aim, "agent": agent, "slots": ", ".join(slots)}
    ask, thoughts = (Template(text).substitute(names) for text in (asked.ask, asked.thoughts))
    calls = calls_text(tools) if asked.answers and tools is not None else ""
    answer = wanted.answer if asked.answers else ""
    return (
        _joined(wanted.question, ask, calls, answer),
        _joined(wanted.question, ask, calls, thoughts, answer),
    )


def calls_text(tools: ToolsSection) -> str:
    """Return how to call the tools that are on, a line for each."""
    calls = []
    if tools.search is not None:
        calls.append("<search>what to look for</search> finds passages of text.")
    if tools.python is not None:
        calls.append("<python>print(2 + 3)</python> runs a program and shows what it prints.")
    if tools.ask:
        calls.append("<ask>your question</ask> asks a human.")
    calls += [f"<{name}>argument</{name}> calls {name}." for name in tools.functions]
    return "\n".join((_CALLS, *calls)) if calls else ""


def _joined(question: str, *lines: str) -> str:
    """Join what is there; one empty line sets the question apart."""
    return f"{question}\n\n" + "".join(f"{line}\n" for line in lines if line)
