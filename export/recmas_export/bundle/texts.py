"""What is known of a backbone without loading it: its texts, and who sends to it."""

from __future__ import annotations

from typing import NamedTuple

from recmas_runtime.formats.codec import StrictStruct


class MessagePath(NamedTuple):
    """The shared name of the backbone that sends, its inner link, and the outer link."""

    backbone: str
    inner: str
    outer: str


class Texts(StrictStruct, frozen=True, kw_only=True):
    """A backbone's chat template and the tokens that are known by name.

    Attributes:
        special_tokens: What the template may name.
        bos_token: Text of the token that starts a sequence, if there is one.
        eos_token_ids: Ids that end an answer, ascending.
        tokenizer_tokens: The `special_tokens_map` of transformers' tokenizer; None where that
            cannot be made again from its tokenizer.json and these.
    """

    chat_template: str
    special_tokens: dict[str, str]
    bos_token: str | None
    eos_token_ids: tuple[int, ...]
    tokenizer_tokens: dict[str, str] | None
