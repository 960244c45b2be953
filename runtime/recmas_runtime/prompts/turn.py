"""A prompt with the assistant's text behind it, as one conversation: what training reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.marks import Marks, unused_salt
from recmas_runtime.prompts.render import (
    DEFAULT_VARIABLES,
    Prompt,
    common_prefix,
    conversation,
    joined,
    split_at_slots,
)
from recmas_runtime.prompts.tokenizer import Tokenizer

_HINT: Final = (
    "If it moves the system text, put that into the prompt; else give the backbone a `template` of "
    "your own, a file or `none`."
)


@dataclass(frozen=True)
class Turn:
    """A prompt followed by the assistant's text, in the items of one prompt.

    Attributes:
        num_target_tokens: So many of its last tokens, at least one, are the assistant's, including
            what the template writes after the text.
        is_as_written: Whether the template itself writes the assistant's text so, and neither
            strips nor changes it.
    """

    prompt: Prompt
    num_target_tokens: int
    is_as_written: bool


def build_turn(
    *,
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    target: str,
    record: Mapping[str, object],
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    variables: Mapping[str, bool | int | float | str] | None = None,
) -> Turn:
    """Render and tokenize a prompt and the assistant's text after it as one conversation.

    A token is the assistant's if it begins where the prompt ends, or later. The target's text
    never becomes a control token, and it is there as a whole: where the template would strip or
    shorten it, or writes another opening into past turns than it gives the assistant (a block of
    reasoning, as a rule), the turn is the prompt, the target, and what the template writes after
    an assistant's text.

    Raises:
        RecmasError: As `build_prompt`; RM206 also if the template leaves the assistant's text out,
            or writes the conversation before it in another way than without it.
    """
    marks = Marks(unused_salt(joined([*system, *prompt], record) + target, chat.literals))
    text = turn_text(
        conversation(system, prompt, record, chat, tokenizer, marks),
        target,
        chat,
        marks,
        {**DEFAULT_VARIABLES, **(variables or {})},
        tokenizer,
    )
    whole = Prompt(split_at_slots(text.whole, tokenizer, marks))
    boundary = len(marks.restore(marks.slot_pattern.split(text.opening)[-1])[0])
    last = marks.restore(marks.slot_pattern.split(text.whole)[-1])
    placed = tokenizer.encode_placed(*last, continues=bool(marks.slots))
    num_target_tokens = sum(start >= boundary for _, start in placed)
    if not num_target_tokens:
        raise _leaves_out()
    return Turn(whole, num_target_tokens, text.is_as_written)


@dataclass(frozen=True)
class TurnText:
    """A turn, the prompt that it begins with, and whether the template writes the text so."""

    whole: str
    opening: str
    is_as_written: bool


def turn_text(
    messages: Sequence[Mapping[str, str]],
    target: str,
    chat: ChatTemplate,
    marks: Marks,
    variables: Mapping[str, bool | int | float | str],
    tokenizer: Tokenizer | None,
) -> TurnText:
    """Return the text of a turn, with marks for control tokens if there is a tokenizer.

    Raises:
        RecmasError: As `build_turn`.
    """

    def marked(text: str) -> str:
        whole = [(0, len(text))]
        return text if tokenizer is None else marks.mark_controls(text, whole, tokenizer)

    def answered(text: str) -> str:
        turns = [*messages, {"role": "assistant", "content": text}]
        return chat.render(turns, add_generation_prompt=False, **variables)

    opening = chat.render(messages, add_generation_prompt=True, **variables)
    content = marked(target)
    rendered = answered(content)
    is_as_written = content in rendered[common_prefix(opening, rendered) :]
    if is_as_written and rendered.startswith(opening):
        return TurnText(rendered, opening, True)
    # A word has nothing that a template would strip, shorten or look for.
    before, mark, after = answered(marks.end).rpartition(marks.end)
    if not mark:
        raise _leaves_out()
    if before.startswith(opening):
        return TurnText(before + content + after, opening, is_as_written)
    asked = _asked(messages, chat, marks, variables)
    if not (asked and before.startswith(asked) and opening.startswith(asked)):
        raise fail(
            "RM206",
            "the chat template writes the conversation in another way once the assistant's text "
            "follows it",
            hint=_HINT,
        )
    # Texts that were taken from such a model begin with what the prompt has opened already.
    opened = opening[common_prefix(opening, before) :].strip()
    if opened and target.startswith(opened):
        content, is_as_written = marked(target.removeprefix(opened).lstrip("\n")), True
    return TurnText(opening + content + after, opening, is_as_written)


def _asked(
    messages: Sequence[Mapping[str, str]],
    chat: ChatTemplate,
    marks: Marks,
    variables: Mapping[str, bool | int | float | str],
) -> str:
    """Return the text up to the end of the last message; empty if the template leaves that out."""
    *earlier, last = messages
    ended = [*earlier, {**last, "content": last["content"] + marks.end}]
    rendered = chat.render(ended, add_generation_prompt=True, **variables)
    return rendered.rpartition(marks.end)[0].rstrip()


def _leaves_out() -> Exception:
    return fail("RM206", "the chat template leaves out the assistant's text", hint=_HINT)
