"""Text to token ids and back, without control tokens that foreign text spells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import tokenizers

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.codec import malformed
from recmas_runtime.prompts.chat_template import ChatTemplate

Span = tuple[int, int]  # characters [first, last) of a text

# What bytes decode to that are not (yet) a whole UTF-8 character.
_REPLACEMENT: Final = "\ufffd"


class Tokenizer:
    """A Hugging Face tokenizer without transformers: the path or the text of a `tokenizer.json`.

    A control token is an added token that is special, or whose text the chat template writes:
    with one in a prompt, a text can end a turn or open another.

    Raises:
        RecmasError: RM404 if the tokenizer is malformed, RM206 if the template is.
    """

    def __init__(self, tokenizer_json: str | Path, chat_template: str) -> None:
        file = str(tokenizer_json) if isinstance(tokenizer_json, Path) else None
        read = tokenizers.Tokenizer.from_file if file else tokenizers.Tokenizer.from_str
        try:
            self._tokenizer = read(str(tokenizer_json))
        # The library raises bare exceptions for whatever it finds wrong.
        except Exception as error:
            raise malformed(file, f"malformed tokenizer: {error}") from error
        # A saved tokenizer may carry settings that would cut or pad prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.control_ids = self._find_control_ids(ChatTemplate(chat_template).literals)

    def _find_control_ids(self, literals: Sequence[str]) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(
            token_id
            for token_id, token in added.items()
            # Some tokenizers add runs of white space as tokens; those are no control tokens.
            if token.special
            or (not token.content.isspace() and any(token.content in text for text in literals))
        )

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode text, control tokens included, without adding special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def control_spans(self, text: str) -> tuple[Span, ...]:
        """Return where the tokenizer finds control tokens, without the space around them."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans = []
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.control_ids:
                # A token may include the white space beside it; that is not part of its text.
                matched = text[first:last]
                first += len(matched) - len(matched.lstrip())
                spans.append((first, first + len(matched.strip())))
        return tuple(spans)

    def encode_piece(self, text: str, plain: Sequence[Span] = ()) -> tuple[int, ...]:
        """Encode text, with ordinary tokens for control tokens that overlap with `plain`.

        There foreign text spells control tokens. All other tokens are those of `encode`.

        Raises:
            RecmasError: RM500 if a control token cannot be spelled with ordinary tokens.
        """
        if not plain:
            return self.encode(text)
        return tuple(token_id for token_id, _ in self.encode_placed(text, plain))

    def encode_placed(self, text: str, plain: Sequence[Span] = ()) -> tuple[tuple[int, int], ...]:
        """Encode text as `encode_piece` does; return each token with where it begins in it."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        placed: list[tuple[int, int]] = []
        end = 0
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            # Some tokenizers leave a word's leading space out of its offsets: it begins where the
            # token before it ended. Tokens of one character's bytes all have its offsets.
            start, end = min(first, end), last
            if token_id in self.control_ids and any(
                first < span_last and span_first < last for span_first, span_last in plain
            ):
                placed += [(spelled, start) for spelled in self._encode_plain(text[first:last])]
            else:
                placed.append((token_id, start))
        return tuple(placed)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id of a token, added ones included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; empty for none of it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def _encode_plain(self, text: str) -> list[int]:
        """Spell `text` with ordinary tokens, as it would be in the middle of other text."""
        # SentencePiece tokenizers put a space before the first word, but not after a line break.
        line_break, ids = self._spell("\n"), self._spell("\n" + text)
        joined = ids[: len(line_break)] != line_break
        ids = self._spell(text) if joined else ids[len(line_break) :]
        if self.control_ids.isdisjoint(ids):
            return ids
        # The vocabulary has the control token as an ordinary word, too: spell it in two parts.
        if len(text) < 2:
            raise fail(
                "RM500",
                f"the text contains {text!r}, which this backbone only knows as a control token",
                hint="Remove it from the record.",
            )
        return self._encode_plain(text[:1]) + self._encode_plain(text[1:])

    def _spell(self, text: str) -> list[int]:
        """Run the tokenizer's stages without its added tokens."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        model = self._tokenizer.model
        return [token.id for word in words for token in model.tokenize(word)]


class IncrementalDecoder:
    """Decodes token ids one by one; never returns a part of a character.

    All that it returns together is what `tokenizer.decode` returns for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The text of tokens [_context:_written] has been returned; they are decoded again with
        # those after them, because some tokenizers drop the first word's space.
        self._ids: list[int] = []
        self._context = 0
        self._written = 0

    def push(self, token_id: int) -> str:
        """Add a token; return the text that no later token can change, possibly none."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(_REPLACEMENT):
            return ""
        if text:
            self._context, self._written = self._written, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what was held back, complete or not."""
        text = self._pending()
        self._context = self._written = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._written])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]
