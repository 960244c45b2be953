"""A prompt as Hugging Face renders and tokenizes it, and which of its tokens are what.

Shape legend: T positions of the prompt, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.ops import Agent
from recmas_runtime.formats.plan import PromptPart, Variant

Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class NaivePrompt:
    """An agent's prompt with messages in its slots.

    Attributes:
        text_positions: Those that are tokens of text and not of the generation prompt.
        num_turn: Positions before the generation prompt.
        fields: By field, the positions of tokens whose characters overlap with its values.
    """

    embeds_TD: Tensor
    text_positions: tuple[int, ...]
    num_turn: int
    fields: Mapping[str, tuple[int, ...]]


def naive_prompt(
    backbone: TorchBackbone,
    agent: Agent,
    variant: Variant,
    record: Record,
    vectors: Mapping[str, Tensor],
    texts: Mapping[str, str],
) -> NaivePrompt:
    """Return a prompt with vectors [M, D] and texts in its slots; a slot without either is empty.

    Texts are read as they are written, so they must not spell control tokens.
    """
    tokenizer = backbone.tokenizer
    assert not any(
        token in text for text in texts.values() for token in tokenizer.get_added_vocab()
    )
    system, _ = _composed(agent.system, record, {})
    user, _ = _composed(agent.parts(variant), record, texts)
    chat = [{"role": "system", "content": system}] if system else []
    opening, rendered = (
        tokenizer.apply_chat_template(
            [*chat, {"role": "user", "content": user}],
            tokenize=False,
            add_generation_prompt=is_whole,
            **{"enable_thinking": False, **agent.chat_template},
        )
        for is_whole in (False, True)
    )
    pieces_TD: list[Tensor] = []
    spans: dict[int, tuple[int, int]] = {}  # of each token of text, in characters
    at = start = 0
    for i, piece in enumerate(_SLOT.split(rendered)):
        if i % 2 == 1:
            found = vectors.get(piece)
            start += len(f"[[slot {piece}]]")
        elif piece:
            read = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
            found = backbone.embed(torch.tensor(read.input_ids, dtype=torch.long))
            for j, (first, last) in enumerate(read.offset_mapping):
                spans[at + j] = (start + first, start + last)
            start += len(piece)
        else:
            continue
        if found is not None:
            pieces_TD.append(found)
            at += len(found)
    num_closing = _num_behind(_tokens(tokenizer, opening), _tokens(tokenizer, rendered))
    fields: dict[str, set[int]] = {}
    for parts, is_user in ((agent.system, False), (agent.parts(variant), True)):
        text, values = _composed(parts, record, texts)
        shown = text.strip()
        place = rendered.rindex(shown) if is_user else rendered.index(shown)
        place -= len(text) - len(text.lstrip())
        for name, first, last in values:
            overlapping = {
                position
                for position, (begin, end) in spans.items()
                if begin < place + last and end > place + first
            }
            fields.setdefault(name, set()).update(overlapping)
    return NaivePrompt(
        embeds_TD=torch.cat(pieces_TD),
        text_positions=tuple(sorted(spans))[: len(spans) - num_closing],
        num_turn=at - num_closing,
        fields={name: tuple(sorted(found)) for name, found in fields.items()},
    )


# Splitting at a pattern with one group gives text, slot, text, slot, ..., text.
_SLOT = re.compile(r"\[\[slot ([^\]]+)\]\]")


def _composed(
    parts: Sequence[PromptPart], record: Record, texts: Mapping[str, str]
) -> tuple[str, list[tuple[str, int, int]]]:
    """Return the text of parts, and where in it the values of fields are, but for white space."""
    text, values = "", []
    for part in parts:
        piece = _text(part, record, texts)
        if part.kind == "field" and piece.strip():
            first = len(text) + len(piece) - len(piece.lstrip())
            values.append((part.value, first, first + len(piece.strip())))
        text += piece
    return text, values


def _text(part: PromptPart, record: Record, texts: Mapping[str, str]) -> str:
    match part.kind:
        case "text":
            return part.value
        case "field":
            name, bracket, index = part.value.partition("[")
            value = record[name]
            if bracket:  # one fact of several
                return str(value[int(index[:-1])])  # type: ignore[index]
            if isinstance(value, list | tuple):  # the choices of a question
                return "\n".join(f"{chr(ord('A') + i)}. {item}" for i, item in enumerate(value))
            return str(value)
        case "slot":
            return texts.get(part.value, f"[[slot {part.value}]]")


def _tokens(tokenizer: object, rendered: str) -> list[object]:
    """Return token ids, and the names of slots where they are."""
    found: list[object] = []
    for i, piece in enumerate(_SLOT.split(rendered)):
        ids = tokenizer(piece, add_special_tokens=False).input_ids  # type: ignore[operator]
        found += [piece] if i % 2 else ids
    return found


def _num_behind(opening: Sequence[object], whole: Sequence[object]) -> int:
    """Return how many of all tokens come behind those that both begin with."""
    pairs = zip(opening, whole, strict=False)
    return len(whole) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
