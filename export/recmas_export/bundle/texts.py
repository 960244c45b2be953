"""What prompts for a backbone are made with, without the backbone."""

from __future__ import annotations

from recmas_runtime.formats.codec import StrictStruct


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
