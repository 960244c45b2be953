"""From a conversation to the record that a system answers, as the plan's `serve` says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.text import counted, listed
from recmas_runtime.formats.plan import ServePlan, field_place, filled_fields
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.running.records import check_id

_ROLES: Final = {"system": "System", "user": "User", "assistant": "Assistant"}
# Of a text made of several, and between the turns of a transcript.
_GAP: Final = "\n\n"


def to_record(
    turns: Sequence[EarlierTurn],
    serve: ServePlan,
    fields: Sequence[str],
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], tuple[EarlierTurn, ...]]:
    """Return the record of a conversation, and the earlier turns that prompts show as such.

    The last message is the question. System messages are one text, in their order, a blank line
    between them; blank ones count as none. Where a field takes that text, it is empty without any.

    Args:
        turns: The whole conversation; the last turn is the user's question.
        serve: What `Plan.conversation` returns.
        fields: What prompts show, as `Plan.fields` has it.
        given: Other fields of the record, from the request itself.

    Raises:
        RecmasError: RM543 for a conversation that the system does not take, RM500 for fields that
            are given twice, that no prompt shows, or that are missing, and for an empty question.
    """
    question = serve.field_of("last_user")
    names = dict.fromkeys(field_place(shown).name for shown in fields)
    if question is None or question not in names:
        raise _no_question(question, fields)
    asked = _last_question(turns)
    earlier = [t for t in turns[:-1] if t.role != "system" or t.content.strip()]
    record: dict[str, Any] = {}
    if (system := serve.field_of("system")) is not None:
        texts = [turn.content for turn in earlier if turn.role == "system"]
        if texts or system not in given:
            record[system] = _GAP.join(texts)
        earlier = [turn for turn in earlier if turn.role != "system"]
    if earlier and serve.history == "refuse":
        raise _refused(earlier)
    is_transcript = serve.history == "transcript"
    record[question] = transcript([*earlier, asked]) if is_transcript else asked.content
    return _with_given(record, given, fields), () if is_transcript else tuple(earlier)


def transcript(turns: Sequence[EarlierTurn]) -> str:
    """Return a conversation as text.

    A single message is its own text. Of several each begins with its role: `System: `, `User: ` or
    `Assistant: `, with a blank line between them and no other mark.
    """
    if len(turns) == 1:
        return turns[0].content
    return _GAP.join(f"{_ROLES[turn.role]}: {turn.content}" for turn in turns)


def in_words(serve: ServePlan, fields: Sequence[str]) -> str:
    """Return what becomes of a conversation, and what every request must bring besides.

    Args:
        fields: What prompts show, as `Plan.fields` has it.
    """
    words = [f"{_PARTS[part]} is {name!r}" for name, part in serve.fields.items()]
    words.append(_HISTORIES[serve.history])
    if others := serve.others(fields):
        words.append(f"every request brings {listed(map(repr, others))} under recmas.record")
    return "; ".join(words)


_PARTS: Final = {"last_user": "the last message", "system": "the text of system messages"}
_HISTORIES: Final = {
    "transcript": "what came before is a transcript in front of it",
    "turns": "what came before are turns in front of the answer agent's prompt",
    "refuse": "earlier messages are refused",
}


def _last_question(turns: Sequence[EarlierTurn]) -> EarlierTurn:
    if not turns:
        hint = 'Send at least {"role": "user", "content": "..."}.'
        raise fail("RM543", "the conversation has no messages", hint=hint)
    last = turns[-1]
    place = f"messages[{len(turns) - 1}], the last one,"
    if last.role != "user":
        raise fail(
            "RM543",
            f"{place} is of the role {last.role}: what is answered is a user's message",
            hint="End the conversation with a message of the role user.",
        )
    if not last.content.strip():
        raise fail("RM500", f"{place} is empty", hint="Write a question.")
    return last


def _with_given(
    record: dict[str, Any], given: Mapping[str, Any], fields: Sequence[str]
) -> dict[str, Any]:
    twice = [name for name in given if name in record]
    if twice:
        raise fail(
            "RM500",
            f"field {twice[0]!r} is given under `recmas.record`, and the conversation fills it",
            hint="Leave it out of `recmas.record`.",
        )
    if "id" in given:
        check_id(
            given["id"], "Leave it out of `recmas.record`, or give a short text or an integer."
        )
    names = dict.fromkeys(field_place(shown).name for shown in fields)
    unseen = [name for name in given if name not in names and name != "id"]
    if unseen:
        raise fail(
            "RM500",
            f"no prompt shows the field {unseen[0]!r} of `recmas.record`",
            hint=f"The prompts use {listed(names)}.",
        )
    whole = {**record, **given}
    missing = [name for name in names if whole.get(name) is None and name != "id"]
    if missing:
        wanted = filled_fields(fields, "...", only=missing)
        shown = json.dumps({"recmas": {"record": wanted}})
        raise fail(
            "RM500",
            f"the prompts use {listed(map(repr, missing))}, which the conversation does not fill",
            hint=f"Send it with the request: {shown}.",
        )
    return whole


def _refused(earlier: Sequence[EarlierTurn]) -> RecmasError:
    systems = [turn for turn in earlier if turn.role == "system"]
    if systems:
        message = "the system takes no system message, and the conversation has "
        message += "one" if len(systems) == 1 else f"{len(systems)}"
        hint = "Leave it out, or say in the spec what becomes of it: `serve: {FIELD: system}`."
    else:
        message = f"the system takes one question, and {counted(len(earlier), 'message')} "
        message += "come before it"
        hint = "Send the last message alone, or build the spec with another `serve.history`."
    return fail("RM543", message, hint=hint)


def _no_question(question: str | None, fields: Sequence[str]) -> RecmasError:
    shown = f"the prompts show {listed(fields)}" if fields else "prompts show nothing of a record"
    what = "no field of a record takes the last message" if question is None else ""
    what = what or f"the last message goes into the field {question!r}, which no prompt shows"
    return fail(
        "RM543",
        f"the system answers no conversation: {what}; {shown}",
        hint="Say in the spec which field takes it: `serve: {FIELD: last_user}`.",
    )
