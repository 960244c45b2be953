"""Drafts of text: where they are refused, because the text would not stay what it is."""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.spec.document.places import Loc
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.declared import Declared
from recmas_runtime.core.errors import Problem
from recmas_runtime.formats.precisions import PRECISIONS

_LOC: Loc = ("answer", "speculation")


def check_speculation(declared: Declared) -> Iterator[Problem]:
    """Drafts of text that is sampled, or written where they cannot be verified."""
    answer, places = declared.document.answer, declared.places
    if answer.speculation is None:
        return
    if answer.temperature > 0:
        message = (
            f"`speculation` drafts greedy text, and `answer.temperature` is {answer.temperature:g}."
        )
        hint = "Remove one of the two."
        yield problem_at(places.key(_LOC), "RM105", message, hint=hint)
    if answer.repetition_penalty != 1:
        message = (
            "`speculation` drafts tokens of the largest logits, which "
            f"`answer.repetition_penalty: {answer.repetition_penalty:g}` changes."
        )
        hint = "Remove one of the two."
        yield problem_at(places.key(_LOC), "RM105", message, hint=hint)
    for name in sorted({declared.document.agents[agent].backbone for agent in writers(declared)}):
        yield from _check_backbone(declared, name)


def writers(declared: Declared) -> tuple[str, ...]:
    """Return the agents that write text: the answer, or what links of theirs carry."""
    senders = [source for (source, _), link in declared.known_links.items() if link.form.needs_text]
    return tuple(
        agent
        for agent in dict.fromkeys((declared.document.answer.agent, *senders))
        if agent in declared.document.agents
    )


def _check_backbone(declared: Declared, name: str) -> Iterator[Problem]:
    document, place = declared.document, declared.places.key(_LOC)
    backbone = document.backbones.get(name)
    if backbone is None:
        return
    answers = document.agents.get(document.answer.agent)
    if backbone.is_remote:
        if answers is not None and answers.backbone == name:
            message = f"`speculation` has no effect on `{name}`, a model behind an API."
            hint = "Remove it: what such a model drafts is its service's own affair."
            yield problem_at(place, "RM129", message, hint=hint)
        return
    precision = backbone.precision or document.build.precision
    if PRECISIONS[precision].draft_margin is None:
        message = (
            f"`speculation` is not supported for `{name}` in precision `{precision}`: a call of "
            "several positions rounds so much otherwise than calls of one that the text would "
            "change."
        )
        able = [row for row, each in PRECISIONS.items() if each.draft_margin is not None]
        hint = f"Remove it, or use precision {' or '.join(able)}."
        yield problem_at(place, "RM121", message, hint=hint)
