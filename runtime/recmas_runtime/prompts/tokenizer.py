"""Text to token ids and back, without control tokens that foreign text spells."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import tokenizers
from tokenizers import models

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.codec import malformed
from recmas_runtime.prompts.chat_template import ChatTemplate

Span = tuple[int, int]  # characters [first, last) of a text
P = ParamSpec("P")
T = TypeVar("T")

# What bytes decode to that are not (yet) a whole UTF-8 character.
_REPLACEMENT: Final = "\ufffd"

# SentencePiece writes a space so.
_WORD_START: Final = "\u2581"

# Put before a piece that is tokenized as the middle of a text; one that joins with none of the
# piece's characters is found by trying.
_BEFORE: Final = ("\n", "\t", ".", "x", "0", "|", "\u00e9")

# Canonical composition makes at most four characters one (Unicode Standard Annex 15).
_COMPOSED: Final = 4
# Stages that keep every character in some token, by the most characters that they make one.
_KEEPING: Final = {
    **dict.fromkeys(("NFC", "NFKC"), _COMPOSED),
    **dict.fromkeys(("ByteLevel", "Digits", "Lowercase", "Metaspace", "NFD", "NFKD", "Prepend"), 1),
}
_NUM_BYTES: Final = 256


class Tokenizer:
    """A Hugging Face tokenizer without transformers: the path or the text of a `tokenizer.json`.

    A control token is an added token that is special, or whose text the chat template writes, or
    that is no plain word: with one in a prompt, a text can end a turn or open another.

    Raises:
        RecmasError: RM404 if the tokenizer is malformed, RM206 if the template is.
    """

    def __init__(self, tokenizer_json: str | Path, chat_template: ChatTemplate | str) -> None:
        self._file = str(tokenizer_json) if isinstance(tokenizer_json, Path) else None
        self._tokenizer = read_tokenizer(tokenizer_json)
        template = ChatTemplate(chat_template) if isinstance(chat_template, str) else chat_template
        self._added = self._tokenizer.get_added_tokens_decoder()
        # Of the tokens that `decode` leaves out.
        self.special_texts = {
            token_id: token.content for token_id, token in self._added.items() if token.special
        }
        self.control_ids = self._find_control_ids(template.literals)
        self._unknown_id = self._find_unknown_id()
        # Whether a text has other tokens in the middle of another one: a space is put before it.
        self._begins_words = self._words("x") != ["x"]

    def _call(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        with _library_errors(self._file):
            return function(*args, **named)

    def _find_control_ids(self, literals: Sequence[str]) -> frozenset[int]:
        return frozenset(
            token_id
            for token_id, token in self._added.items()
            if token.special
            or not _is_plain(token.content)
            or (token.content.strip() and any(token.content in text for text in literals))
        )

    def _find_unknown_id(self) -> int | None:
        model: Any = self._tokenizer.model
        if isinstance(model, models.Unigram):  # which tells its settings only so
            found = re.search(rb'"unk_id":(\d+)', model.__getstate__())
            return int(found.group(1)) if found else None
        token = getattr(model, "unk_token", None)
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode text, control tokens included, without adding special tokens."""
        return tuple(self._encode(text).ids)

    def control_spans(self, text: str) -> tuple[Span, ...]:
        """Return where the tokenizer finds control tokens, without the space around them."""
        encoding = self._encode(text)
        spans = []
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.control_ids:
                # A token may include the white space beside it; that is not part of its text.
                matched = text[first:last]
                if self._is_unknown(token_id, matched):
                    continue
                first += len(matched) - len(matched.lstrip())
                spans.append((first, first + len(matched.strip())))
        return tuple(spans)

    def encode_piece(
        self, text: str, plain: Sequence[Span] = (), *, continues: bool = False
    ) -> tuple[int, ...]:
        """Encode text, with ordinary tokens for control tokens that overlap with `plain`.

        There foreign text spells control tokens. All other tokens are those of `encode`, or those
        that the text has in the middle of a longer one if it `continues` that.

        Args:
            plain: In order; they do not overlap.

        Raises:
            RecmasError: RM500 if a control token cannot be spelled with ordinary tokens.
        """
        return tuple(
            token_id for token_id, _ in self.encode_placed(text, plain, continues=continues)
        )

    def encode_placed(
        self, text: str, plain: Sequence[Span] = (), *, continues: bool = False
    ) -> tuple[tuple[int, int], ...]:
        """Encode text as `encode_piece` does; return each token with where it begins in it."""
        ids, offsets = self._located(text, continues=continues and self._begins_words)
        placed: list[tuple[int, int]] = []
        end = nearest = 0
        for token_id, (first, last) in zip(ids, offsets, strict=True):
            # Some tokenizers leave a word's leading space out of its offsets: it begins where the
            # token before it ended. Tokens of one character's bytes all have its offsets.
            start, end = min(first, end), last
            if token_id not in self.control_ids:
                placed.append((token_id, start))
                continue
            while nearest < len(plain) and plain[nearest][1] <= first:
                nearest += 1
            is_foreign = nearest < len(plain) and plain[nearest][0] < last
            if is_foreign and not self._is_unknown(token_id, text[first:last]):
                placed += [(spelled, start) for spelled in self._encode_plain(text[first:last])]
            else:
                placed.append((token_id, start))
        return tuple(placed)

    @cached_property
    def opening_ids(self) -> tuple[int, ...]:
        """The tokens that the tokenizer itself puts before a text, as a rule one or none."""
        encoding = self._call(self._tokenizer.encode, "x", add_special_tokens=True)
        added = takewhile(
            lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        )
        return tuple(token_id for token_id, _ in added)

    def encode_raw(self, text: str) -> tuple[tuple[int, int], ...]:
        """Encode a text as the tokenizer itself does, with what it puts before it.

        Control tokens that the text spells are such tokens. Returns each token with where it begins
        in the text.
        """
        placed = [(token_id, 0) for token_id in self.opening_ids]
        encoding = self._encode(text)
        end = 0
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            placed.append((token_id, min(first, end)))  # as in `encode_placed`
            end = last
        return tuple(placed)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        return self._call(self._tokenizer.decode, list(ids), skip_special_tokens=True)

    def _encode(self, text: str) -> tokenizers.Encoding:
        return self._call(self._tokenizer.encode, text, add_special_tokens=False)

    def _located(self, text: str, *, continues: bool) -> tuple[list[int], list[Span]]:
        """Return ids and offsets; of a text that continues another without a space before it."""
        for before in _BEFORE if continues else ():
            alone, joined = self._encode(before), self._encode(before + text)
            count, size = len(alone.ids), len(before)
            spans = joined.offsets
            is_apart = all(first >= size for first, _ in spans[count:])
            if joined.ids[:count] == alone.ids and is_apart and spans[:count] == alone.offsets:
                return joined.ids[count:], [(a - size, b - size) for a, b in spans[count:]]
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _is_unknown(self, token_id: int, matched: str) -> bool:
        """Tell whether a token stands for what the vocabulary lacks, and not for its own text."""
        if token_id != self._unknown_id:
            return False
        told = self._normalized(matched).replace(_WORD_START, " ").strip()
        return told != self._tokenizer.id_to_token(token_id)

    @property
    def added_texts(self) -> tuple[str, ...]:
        """The texts of added tokens, in order of their code points."""
        return tuple(sorted(token.content for token in self._added.values()))

    @property
    def largest_id(self) -> int:
        """The largest id of a token, added ones included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it; empty for none of it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def text_of(self, token_id: int) -> str:
        """Return what a token adds to a text; as the vocabulary spells it where that is no text."""
        # In the middle of a text: some tokenizers leave the first word's space out.
        before = self.encode("x")
        text = self.decode([*before, token_id])[len(self.decode(before)) :]
        return self.token_text(token_id) if not text or _REPLACEMENT in text else text

    def _encode_plain(self, text: str) -> list[int]:
        """Spell `text` with ordinary tokens, as it would be in the middle of other text."""
        # SentencePiece tokenizers put a space before the first word, but not after a line break.
        line_break, ids = self._spell("\n"), self._spell("\n" + text)
        joined = ids[: len(line_break)] != line_break
        ids = self._spell(text) if joined else ids[len(line_break) :]
        found = self.control_ids.intersection(ids)
        if not found or all(self._is_unknown(token_id, text) for token_id in found):
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
        tokenize = self._tokenizer.model.tokenize
        return [token.id for word in self._words(text) for token in self._call(tokenize, word)]

    def _normalized(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else self._call(normalizer.normalize_str, text)

    def _words(self, text: str) -> list[str]:
        splitter = self._tokenizer.pre_tokenizer
        if splitter is None:
            return [self._normalized(text)]
        pieces = self._call(splitter.pre_tokenize_str, self._normalized(text))
        return [word for word, _ in pieces]

    @cached_property
    def max_token_chars(self) -> int | None:
        """The most characters of a text that become one token; None if there is no such number.

        Tokenizers that drop characters, or make one token of a whole word that they do not know,
        have none.
        """
        shrink = 1
        for stage in (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer):
            most = 1 if stage is None else _most_made_one(json.loads(stage.__getstate__()))
            if most is None:
                return None
            shrink *= most
        # They take white space beside them along, any amount of it.
        swallow = [t for i, t in self._added.items() if t.lstrip or t.rstrip]
        if any(not t.special for t in swallow) or not self._tells_all_characters():
            return None
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return shrink * max(map(len, vocabulary), default=1)

    def _tells_all_characters(self) -> bool:
        """Whether each character that the vocabulary lacks takes a token of its own."""
        model: Any = self._tokenizer.model
        if not isinstance(model, models.BPE):
            return False
        has_bytes = all(model.token_to_id(f"<0x{b:02X}>") is not None for b in range(_NUM_BYTES))
        if model.byte_fallback and has_bytes:
            return True
        if model.unk_token is not None and not model.fuse_unk:
            return True
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        return "".join(self._words("\u00e9")).endswith("\u00c3\u00a9") and all(
            model.token_to_id(letter) is not None for letter in alphabet
        )


def read_tokenizer(tokenizer_json: str | Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of the path or the text of a `tokenizer.json`; it neither cuts nor pads.

    Raises:
        RecmasError: RM404 if it is malformed.
    """
    file = str(tokenizer_json) if isinstance(tokenizer_json, Path) else None
    read = tokenizers.Tokenizer.from_file if file else tokenizers.Tokenizer.from_str
    with _panics_silenced(), _library_errors(file):
        tokenizer = read(str(tokenizer_json))
    # A saved tokenizer may carry settings that would cut or pad prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextmanager
def _library_errors(file: str | None) -> Iterator[None]:
    """Turn what the library raises, bare exceptions and panics that are none, into RM404."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, RecmasError):
        raise
    except BaseException as error:
        raise malformed(file, f"malformed tokenizer: {error}") from error


def _is_plain(content: str) -> bool:
    """Tell whether an added token is a word, or white space as some tokenizers add it."""
    return all(c.isalnum() or c.isspace() or c == _WORD_START for c in content)


def _most_made_one(stage: dict[str, Any]) -> int | None:
    """Return how many characters a normalizer or pre-tokenizer makes one at most; None: no end."""
    match stage:
        case {"type": "Sequence", "normalizers": parts} | {
            "type": "Sequence",
            "pretokenizers": parts,
        }:
            product = 1
            for part in parts:
                most = _most_made_one(part)
                if most is None:
                    return None
                product *= most
            return product
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if new:
            return -(-len(old) // len(new))
        case {"type": "Split" | "Punctuation", "behavior": str(behavior)}:
            return None if behavior == "Removed" else 1
        case {"type": str(kind)}:
            return _KEEPING.get(kind)
    return None


@contextmanager
def _panics_silenced() -> Iterator[None]:
    """Keep what the library prints when it panics off the terminal; other text is printed after.

    A panic is reported as an error of ours. It prints straight to the descriptor, with a trace.
    """
    try:
        stream = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, AttributeError, ValueError):  # no such stream, or no room: print as it comes
        yield
        return
    with stream:
        os.dup2(stream.fileno(), 2)
        panicked = True
        try:
            yield
            panicked = False
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            stream.seek(0)
            text = stream.read()
            if text and not (panicked and b"panicked at" in text):
                os.write(2, text)


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

    @property
    def holds_part(self) -> bool:
        """Whether a part of a character is held back."""
        return self._pending().endswith(_REPLACEMENT)

    def flush(self) -> str:
        """Return what was held back, complete or not."""
        text = self._pending()
        self._context = self._written = len(self._ids)
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._written])
        return self._tokenizer.decode(self._ids[self._context :])[len(before) :]
