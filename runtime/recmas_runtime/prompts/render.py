"""From a prompt's parts and a record to token ids with slots between them.

The chat template sees the whole conversation, with a unique word in place of each slot; the
rendered text is then split at these words and each piece is tokenized on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final, NamedTuple, Self

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.messages import RowsOf
from recmas_runtime.formats.plan import PromptPart, Variant, field_place
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.earlier_turns import EarlierTurn, as_fields, system_parts, turn_parts
from recmas_runtime.prompts.marks import Marks, unused_salt
from recmas_runtime.prompts.places import Places
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
        cls,
        tokenizer_json: str | Path,
        chat_template: str,
        special_tokens: Mapping[str, str],
        *,
        day: date | None = None,
    ) -> Self:
        """Return what the path or the text of a `tokenizer.json` and a chat template's text make.

        Args:
            day: What a template gets that writes the date; None for today, which then stays.

        Raises:
            RecmasError: RM404 if the tokenizer is malformed, RM206 if the template is.
        """
        template = ChatTemplate(chat_template, special_tokens, day=day)
        return cls(tokenizer=Tokenizer(tokenizer_json, template), template=template)


@dataclass(frozen=True)
class Tokens:
    """A piece of text, tokenized; never empty."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """Where the message from `agent` goes."""

    agent: str


class ChatMessage(NamedTuple):
    """A message of a conversation: `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be embedded: pieces and slots in order.

    Attributes:
        num_closing: So many of its last tokens are the generation prompt, the opening of the
            assistant's turn.
        fields: By field of the record, which of the prompt's text tokens overlap with its text,
            slots not counted. Both are known where the prompt was built with `placed` only.
        messages: In place of all that, where it is for a remote model.
    """

    items: tuple[Tokens | Slot, ...]
    num_closing: int = 0
    fields: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    messages: tuple[ChatMessage, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Text tokens, messages not counted."""
        return sum(len(item.ids) for item in self.items if isinstance(item, Tokens))

    def num_positions(self, slots: Mapping[str, int]) -> int:
        """Return how many positions it takes, given those that thoughts fill in each slot."""
        spliced = (slots.get(item.agent, 0) for item in self.items if isinstance(item, Slot))
        return self.num_tokens + sum(spliced)

    def num_rows(self, kind: RowsOf, slots: Mapping[str, int]) -> int:
        """Return how many rows its `context` has, or all of the `prompt`."""
        return self.num_positions(slots) - (self.num_closing if kind == "context" else 0)

    def context_positions(self, of: str | None, slots: Mapping[str, int]) -> list[int]:
        """Return the positions of its text without slots and generation prompt, or of one field.

        Args:
            of: Name of a field; None for all text.
            slots: How many positions each slot takes.
        """
        places: list[int] = []
        at = 0
        for item in self.items:
            count = len(item.ids) if isinstance(item, Tokens) else slots.get(item.agent, 0)
            places += range(at, at + count) if isinstance(item, Tokens) else ()
            at += count
        if of is None:
            return places[: len(places) - self.num_closing]
        return [places[index] for index in self.fields.get(of, ())]

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Token ids before the first slot: what may be equal from round to round."""
        first = self.items[0] if self.items else None
        return first.ids if isinstance(first, Tokens) else ()


# Returns a prompt of a batch of records: the record's place in it, the agent, which of its prompts,
# and by slot the text that stands there instead of a message.
PromptSource = Callable[[int, str, Variant, Mapping[str, str]], Prompt]


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
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
    placed: bool = False,
    turns: Sequence[EarlierTurn] = (),
) -> Prompt:
    """Render and tokenize one agent's prompt for one record.

    Text of the record and of earlier turns never becomes a control token: where it spells one, it
    is encoded as plain text.

    Args:
        system: Parts of the system text; there is no system message if the text is empty.
        record: Field values; `id` names the record in errors.
        variables: Variables of the chat template, over `DEFAULT_VARIABLES`.
        placed: Find out also where the generation prompt and the fields are, for agents whose
            states or rows are handed over.
        turns: Come before the prompt as turns of their own; system messages among them stand in
            the system text, behind the agent's.

    Raises:
        RecmasError: RM500 if a field is missing or unusable, RM206 if the chat template fails,
            leaves out the system text, or leaves out or repeats a slot.
    """
    record = {**record, **as_fields(turns)}
    if not joined(system, record):
        system = ()  # also with words around its fields, which are empty
    system = [*system, *system_parts(turns, is_first=not system)]
    written = [*system, *(part for _, part in turn_parts(turns)), *prompt]
    marks = Marks(unused_salt(joined(written, record), chat.literals))
    messages = conversation(system, prompt, record, chat, tokenizer, marks, turns=turns)
    given = {**DEFAULT_VARIABLES, **(variables or {})}
    rendered = chat.render(messages, add_generation_prompt=True, **given)
    items = split_at_slots(rendered, tokenizer, marks)
    if not placed:
        return Prompt(items)
    # The same marks come out once more, so both renderings differ in nothing but the bounds.
    bounds = Marks(marks.salt)
    bounded = conversation(
        system, prompt, record, chat, tokenizer, bounds, turns=turns, with_bounds=True
    )
    places = Places(
        whole=rendered,
        opening=chat.render(messages, add_generation_prompt=False, **given),
        bounded=chat.render(bounded, add_generation_prompt=True, **given),
        values=bounds.values,
    )
    num_closing, fields = places.find(tokenizer, marks)
    return Prompt(items, num_closing=num_closing, fields=fields)


def chat_messages(
    *,
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    record: Mapping[str, object],
    turns: Sequence[EarlierTurn] = (),
) -> tuple[ChatMessage, ...]:
    """Return one agent's prompt for one record, for a service that renders prompts itself.

    Slots that nothing fills show nothing. There are no tokens here: what a text spells is a matter
    of the service.

    Args:
        system: Parts of the system text; there is no system message if the text is empty.
        turns: Come before the prompt as turns of their own; system messages among them stand in
            the system text, behind the agent's.

    Raises:
        RecmasError: RM500 if a field is missing or unusable.
    """
    fields = {**record, **as_fields(turns)}
    if not joined(system, fields):
        system = ()
    text = joined([*system, *system_parts(turns, is_first=not system)], fields)
    earlier = [ChatMessage(role, joined([part], fields)) for role, part in turn_parts(turns)]
    first = [ChatMessage("system", text)] if text else []
    return (*first, *earlier, ChatMessage("user", joined(prompt, fields)))


def field_text(shown: str, record: Mapping[str, object]) -> str:
    """Return a record's field as the prompt shows it; a list becomes lettered lines.

    Args:
        shown: The field, or `facts[0]` for an entry of one that is a list.

    Raises:
        RecmasError: RM500 if the field is missing or of a kind that prompts cannot show, no list
            where an entry is shown, or too short a list.
    """
    name, index = field_place(shown)
    value = record.get(name)
    if value is None:
        raise _unusable(record, f"has no field {name!r}, which the prompts use")
    if index is not None:
        return _entry_text(shown, value, record)
    if isinstance(value, list | tuple):
        if len(value) > len(_LETTERS):
            raise _unusable(record, f"field {name!r} has {len(value)} entries, at most 26 fit")
        lines = [_scalar_text(name, item, record) for item in value]
        return "\n".join(f"{letter}. {line}" for letter, line in zip(_LETTERS, lines, strict=False))
    return _scalar_text(name, value, record)


def _entry_text(shown: str, value: object, record: Mapping[str, object]) -> str:
    name, index = field_place(shown)
    if not isinstance(value, list | tuple):
        raise _unusable(record, f"field {name!r} is no list, and the prompts use {shown}")
    if index is None or index >= len(value):
        has = "1 entry" if len(value) == 1 else f"{len(value)} entries"
        raise _unusable(record, f"field {name!r} has {has}, and the prompts use {shown}")
    if not isinstance(value[index], str | int | float):
        raise _unusable(record, f"field {shown!r} is neither text nor number")
    return _scalar_text(shown, value[index], record)


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


def text_chars(parts: Sequence[PromptPart], record: Mapping[str, object]) -> int:
    """Return how many characters fields bring into a prompt, but the space around them.

    A template may strip that, and control tokens beside it may take it along.
    """
    return sum(len(field_text(p.value, record).strip()) for p in parts if p.kind == "field")


def joined(parts: Sequence[PromptPart], record: Mapping[str, object]) -> str:
    """Return the text of all parts but slots."""
    return "".join(
        field_text(part.value, record) if part.kind == "field" else part.value
        for part in parts
        if part.kind != "slot"
    )


def conversation(
    system: Sequence[PromptPart],
    prompt: Sequence[PromptPart],
    record: Mapping[str, object],
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    marks: Marks,
    *,
    turns: Sequence[EarlierTurn] = (),
    with_bounds: bool = False,
) -> list[dict[str, str]]:
    """Return the messages that the assistant is to answer, with marks; also around values.

    Args:
        turns: Those whose texts are fields of the record by now; system messages are left out.
    """
    compose = partial(_compose, record=record, tokenizer=tokenizer, marks=marks)
    system_text = compose(system, with_bounds=with_bounds)
    # Without bounds: templates may leave out a part of what an assistant has said.
    earlier = [
        {"role": role, "content": compose([part], with_bounds=False)}
        for role, part in turn_parts(turns)
    ]
    *first, last = messages_of(system_text, compose(prompt, with_bounds=with_bounds), chat)
    return [*first, *earlier, last]


def messages_of(system: str, prompt: str, chat: ChatTemplate) -> list[dict[str, str]]:
    """Return the messages of a system text, unless it is empty, and a prompt.

    Raises:
        RecmasError: RM206 if the template leaves out system texts.
    """
    messages = [{"role": "user", "content": prompt}]
    if system:
        if not chat.writes_system_text:
            raise fail(
                "RM206",
                "the backbone's chat template leaves out the system text",
                hint="Move the system text into the prompt.",
            )
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _compose(
    parts: Sequence[PromptPart],
    record: Mapping[str, object],
    tokenizer: Tokenizer,
    marks: Marks,
    *,
    with_bounds: bool,
) -> str:
    """Join parts into a message's content, with marks in place of slots and control tokens."""
    pieces: list[str] = []
    names: list[str] = []
    values: list[Span] = []
    length = 0
    for part in parts:
        match part.kind:
            case "text":
                piece = part.value
            case "slot":
                piece = marks.for_slot(part.value)
            case "field":
                piece = field_text(part.value, record)
                names.append(part.value)
                values.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    content = "".join(pieces)
    if not values:
        return content
    marked, spans = marks.mark_values(content, values, tokenizer)
    if not with_bounds:
        return marked
    bounded: list[str] = []
    at = 0
    for name, (first, last) in zip(names, spans, strict=True):
        bounded += (marked[at:first], marks.around_value(name, marked[max(at, first) : last]))
        at = max(at, last)
    return "".join((*bounded, marked[at:]))


def split_at_slots(rendered: str, tokenizer: Tokenizer, marks: Marks) -> tuple[Tokens | Slot, ...]:
    """Tokenize what was rendered, piece by piece between the slots.

    Raises:
        RecmasError: RM206 if the template leaves out or repeats a slot, or changes their order.
    """
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
        elif ids := tokenizer.encode_piece(*marks.restore(piece), continues=index > 0):
            items.append(Tokens(ids))
    return tuple(items)
