"""From a prompt's parts and a record to token ids with slots between them.

The chat template sees the whole conversation, with a unique word in place of each slot; the
rendered text is then split at these words and each piece is tokenized on its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Final, Self

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.plan import PromptPart
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.tokenizer import Span, Tokenizer

# Reasoning models think in text unless an agent asks otherwise; here they think in latent steps.
DEFAULT_VARIABLES: Final[Mapping[str, bool | int | float | str]] = {"enable_thinking": False}

_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What turns a conversation into a backbone's tokens."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @classmethod
    def load(
        cls, tokenizer_json: str | Path, chat_template: str, special_tokens: Mapping[str, str]
    ) -> Self:
        """Return what the path or the text of a `tokenizer.json` and a chat template's text make.

        Raises:
            RecmasError: RM404 if the tokenizer is malformed, RM206 if the template is.
        """
        return cls(
            tokenizer=Tokenizer(tokenizer_json, chat_template),
            template=ChatTemplate(chat_template, special_tokens),
        )


@dataclass(frozen=True)
class Tokens:
    """A piece of text, tokenized; never empty."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where the message from `agent` goes."""

    agent: str


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be embedded: pieces and slots in order."""

    items: tuple[Tokens | Slot, ...]

    @property
    def num_tokens(self) -> int:
        """Text tokens, messages not counted."""
        return sum(len(item.ids) for item in self.items if isinstance(item, Tokens))

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Token ids before the first slot: what may be equal from round to round."""
        first = self.items[0] if self.items else None
        return first.ids if isinstance(first, Tokens) else ()


@dataclass(frozen=True)
class Turn:
    """A prompt followed by the assistant's text, in the items of one prompt.

    Of its last tokens `num_target_tokens`, at least one, are the assistant's, including what the
    template writes after the text.
    """

    prompt: Prompt
    num_target_tokens: int


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def build_prompt(
    *,
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    record: Mapping[str, object],
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    variables: Mapping[str, bool | int | float | str] | None = None,
) -> Prompt:
    """Render and tokenize one agent's prompt for one record.

    Text of the record never becomes a control token: where a field's value spells one, it is
    encoded as plain text.

    Args:
        system: Parts of the system text; there is no system message if the text is empty.
        record: Field values; `id` names the record in errors.
        variables: Variables of the chat template, over `DEFAULT_VARIABLES`.

    Raises:
        RecmasError: RM500 if a field is missing or unusable, RM206 if the chat template fails,
            leaves out the system text, or leaves out or repeats a slot.
    """
    marks = _Marks(_unused_salt(_joined([*system, *prompt], record), chat))
    messages = _messages(system, prompt, record, chat, tokenizer, marks)
    rendered = chat.render(
        messages, add_generation_prompt=True, **{**DEFAULT_VARIABLES, **(variables or {})}
    )
    return Prompt(_tokenize(rendered, tokenizer, marks))


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
    never becomes a control token.

    Raises:
        RecmasError: As `build_prompt`; RM206 also if the template does not write the target
            right after the prompt, or leaves it out.
    """
    marks = _Marks(_unused_salt(_joined([*system, *prompt], record) + target, chat))
    messages = _messages(system, prompt, record, chat, tokenizer, marks)
    marked_target = _mark_controls(target, [(0, len(target))], tokenizer, marks)
    values = {**DEFAULT_VARIABLES, **(variables or {})}
    opening = chat.render(messages, add_generation_prompt=True, **values)
    answered = [*messages, {"role": "assistant", "content": marked_target}]
    rendered = chat.render(answered, add_generation_prompt=False, **values)
    if not rendered.startswith(opening):
        raise fail(
            "RM206",
            "the chat template does not write the assistant's text right after the prompt",
            hint="If it moves the system text, put that into the prompt; if it opens a reasoning "
            "block, set `chat_template: {enable_thinking: true}`; else use another backbone.",
        )
    whole = Prompt(_tokenize(rendered, tokenizer, marks))
    boundary = len(_restore(marks.slot_pattern.split(opening)[-1], marks)[0])
    placed = tokenizer.encode_placed(*_restore(marks.slot_pattern.split(rendered)[-1], marks))
    num_target_tokens = sum(start >= boundary for _, start in placed)
    if not num_target_tokens:
        raise fail(
            "RM206",
            "the chat template leaves out the assistant's text",
            hint="Use another backbone for this agent.",
        )
    return Turn(whole, num_target_tokens)


def field_text(name: str, record: Mapping[str, object]) -> str:
    """Return a record's field as the prompt shows it; a list becomes lettered lines.

    Raises:
        RecmasError: RM500 if the field is missing or of a kind that prompts cannot show.
    """
    value = record.get(name)
    if value is None:
        raise _unusable(record, f"has no field {name!r}, which the prompts use")
    if isinstance(value, list | tuple):
        if len(value) > len(_LETTERS):
            raise _unusable(record, f"field {name!r} has {len(value)} entries, at most 26 fit")
        lines = [_scalar_text(name, item, record) for item in value]
        return "\n".join(f"{letter}. {line}" for letter, line in zip(_LETTERS, lines, strict=False))
    return _scalar_text(name, value, record)


def _scalar_text(name: str, value: object, record: Mapping[str, object]) -> str:
    if not isinstance(value, str | int | float):  # bool is an int
        raise _unusable(record, f"field {name!r} is neither text, number nor a list of them")
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _unusable(record, f"field {name!r} holds half a surrogate pair") from None
    return text


def _unusable(record: Mapping[str, object], message: str) -> RecmasError:
    return fail("RM500", f"record {record.get('id')!r} {message}", hint="Correct the record.")


@dataclass
class _Marks:
    """Words in place of slots, and of control tokens that a record spells.

    Templates that trim or escape text do not change them, because they are letters and digits; and
    no other text of the prompt is taken for one, because none contains the salt.
    """

    salt: str
    slots: list[str] = field(default_factory=list)
    spellings: list[str] = field(default_factory=list)

    def for_slot(self, agent: str) -> str:
        self.slots.append(agent)
        return f"{self.salt}S{len(self.slots) - 1}E"

    def for_spelling(self, text: str) -> str:
        self.spellings.append(text)
        return f"{self.salt}C{len(self.spellings) - 1}E"

    @property
    def slot_pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.salt}S([0-9]+)E")

    @property
    def spelling_pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.salt}C([0-9]+)E")


def _joined(parts: Sequence[PromptPart], record: Mapping[str, object]) -> str:
    """Return the text of all parts but slots."""
    return "".join(
        field_text(part.value, record) if part.kind == "field" else part.value
        for part in parts
        if part.kind != "slot"
    )


def _unused_salt(text: str, chat: ChatTemplate) -> str:
    """Return a salt that no rendering of this text can contain."""
    # Without space, because a template may strip two messages and so join their ends.
    dense = "".join(text.split())
    number = 0
    while any(f"recmas{number}x" in found for found in (dense, *chat.literals)):
        number += 1
    return f"recmas{number}x"


def _messages(
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    record: Mapping[str, object],
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    marks: _Marks,
) -> list[dict[str, str]]:
    """Return the conversation that the assistant is to answer."""
    system_text = _compose(system, record, tokenizer, marks)
    messages = [{"role": "user", "content": _compose(prompt, record, tokenizer, marks)}]
    if system_text:
        if not chat.writes_system_text:
            raise fail(
                "RM206",
                "the backbone's chat template leaves out the system text",
                hint="Move the system text into the prompt.",
            )
        messages.insert(0, {"role": "system", "content": system_text})
    return messages


def _compose(
    parts: Sequence[PromptPart], record: Mapping[str, object], tokenizer: Tokenizer, marks: _Marks
) -> str:
    """Join parts into a message's content, with marks in place of slots and control tokens."""
    content = ""
    values: list[Span] = []
    for part in parts:
        match part.kind:
            case "text":
                content += part.value
            case "slot":
                content += marks.for_slot(part.value)
            case "field":
                value = field_text(part.value, record)
                values.append((len(content), len(content) + len(value)))
                content += value
    return _mark_controls(content, values, tokenizer, marks) if values else content


def _mark_controls(
    content: str, values: Sequence[Span], tokenizer: Tokenizer, marks: _Marks
) -> str:
    """Put marks in place of control tokens that overlap with the text of `values`."""
    # The tokenizer finds what a search would miss: tokens that a normalizer makes, or that begin in
    # a field and end outside.
    spelled = [
        (first, last)
        for first, last in tokenizer.control_spans(content)
        if any(first < value_last and value_first < last for value_first, value_last in values)
    ]
    marked = ""
    position = 0
    for first, last in spelled:
        marked += content[position:first] + marks.for_spelling(content[first:last])
        position = last
    return marked + content[position:]


def _tokenize(rendered: str, tokenizer: Tokenizer, marks: _Marks) -> tuple[Tokens | Slot, ...]:
    # Splitting at a pattern with one group gives text, slot, text, slot, ..., text.
    pieces = marks.slot_pattern.split(rendered)
    found = [int(number) for number in pieces[1::2]]
    if found != list(range(len(marks.slots))):
        raise fail(
            "RM206",
            f"the chat template shows slots {found} of a prompt with {len(marks.slots)} slots",
            hint="It must write every message's text once, in order: use another backbone.",
        )
    items: list[Tokens | Slot] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            items.append(Slot(marks.slots[int(piece)]))
        elif ids := tokenizer.encode_piece(*_restore(piece, marks)):
            items.append(Tokens(ids))
    return tuple(items)


def _restore(piece: str, marks: _Marks) -> tuple[str, list[Span]]:
    """Put the spellings back in place of their marks; return the text and where they are."""
    # Text, number of a spelling, text, ..., text, as above.
    parts = marks.spelling_pattern.split(piece)
    text = ""
    spans: list[Span] = []
    for index, part in enumerate(parts):
        if index % 2:
            spelling = marks.spellings[int(part)]
            spans.append((len(text), len(text) + len(spelling)))
            text += spelling
        else:
            text += part
    return text, spans
