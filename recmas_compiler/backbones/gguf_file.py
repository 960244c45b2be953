"""The header of a GGUF file, without its weights, and the tokenizer that it describes.

A GGUF file holds a vocabulary and merges, and of the split before them only a name. What the name
stands for is a table here: libraries know some of the names and take a split of their own for the
rest, which gives other ids, above all around numbers and line breaks.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import pre_tokenizers

from recmas_runtime.core.errors import fail

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# GGUF's value type -> struct format (little endian), from the format's specification
_NUMBERS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}

_BYTE_LEVEL_BPE: Final = "gpt2"


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How a vocabulary's training cut text into words.

    Attributes:
        pattern: What a word is; None for the pattern of GPT-2.
        single_digits: Every digit is cut off before anything else.
        whole_words: A word that is a token is that token, whatever its merges would give.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        byte_level = pre_tokenizers.ByteLevel
        if self.pattern is not None:
            words = pre_tokenizers.Split(tokenizers.Regex(self.pattern), behavior="isolated")
            last = byte_level(add_prefix_space=False, use_regex=False)
            return pre_tokenizers.Sequence([words, last])
        if self.single_digits:
            digits = pre_tokenizers.Digits(individual_digits=True)
            return pre_tokenizers.Sequence([digits, byte_level(add_prefix_space=False)])
        return byte_level(add_prefix_space=False)


def _words_of(digits: str, letters: str = r"\p{L}") -> str:
    """Return the pattern that Llama 3 and Qwen share but for the length of numbers and letters."""
    marks = r"\p{M}" if "M" in letters else ""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = _Split()
_DIGITS_FIRST = _Split(single_digits=True)
_LLAMA3 = _Split(pattern=_words_of(r"\p{N}{1,3}"), whole_words=True)
_QWEN2 = _Split(pattern=_words_of(r"\p{N}"))

# What `tokenizer.ggml.pre` names, by the tokenizer files of the models that the names come from.
_SPLITS: Final[Mapping[str, _Split]] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "command-r": _DIGITS_FIRST,
    "codeshell": _DIGITS_FIRST,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _Split(pattern=_words_of(r"\p{N}", r"[\p{L}\p{M}]")),
}


def read_gguf_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """Return the byte-level BPE tokenizer of a GGUF file, or None if it is of another kind.

    It has no added tokens.

    Raises:
        RecmasError: RM202 if the file names a split that recmas does not know.
    """
    values = read_gguf_values(path)
    if values.get("tokenizer.ggml.model") != _BYTE_LEVEL_BPE:
        return None
    tokens, merges = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    split_as_named(tokenizer, values, source=str(path))
    return tokenizer


def split_as_named(
    tokenizer: tokenizers.Tokenizer, values: Mapping[str, Any], *, source: str
) -> None:
    """Make a tokenizer cut text into words as a GGUF file says; those of other kinds stay.

    Args:
        tokenizer: Changed in place.
        values: Of the file's header.
        source: How errors name the backbone.

    Raises:
        RecmasError: RM202 if recmas does not know the split.
    """
    if values.get("tokenizer.ggml.model") != _BYTE_LEVEL_BPE:
        return
    name = values.get("tokenizer.ggml.pre")
    split = _SPLITS.get(str(name))
    if split is None:
        said = f"names the pre-tokenizer {name!r}" if name else "names no pre-tokenizer"
        raise fail(
            "RM202",
            f"the GGUF file of backbone {source!r} {said}, so its tokens cannot be told",
            hint="Use the model's safetensors repository. Known pre-tokenizers: "
            f"{', '.join(_SPLITS)}.",
        )
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    # The library hands out copies of a model, so a changed one must be set again.
    model = tokenizer.model
    model.ignore_merges = split.whole_words
    tokenizer.model = model


def refuse_adapter(values: Mapping[str, Any], *, source: str) -> None:
    """Refuse a GGUF file that holds an adapter instead of a model.

    Raises:
        RecmasError: RM202 if it does.
    """
    kind = values.get("general.type", "model")
    if kind != "model":
        raise fail(
            "RM202",
            f"the GGUF file of backbone {source!r} holds no model but is of type {kind!r}",
            hint="Merge an adapter into its model, and name the merged model.",
        )


def read_gguf_values(path: Path) -> dict[str, Any]:
    """Return the key/value pairs in the header of a GGUF file of version 2 or 3.

    Raises:
        ValueError: It is no such file.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        if raw[:4] != _MAGIC:
            raise ValueError(f"{path} is not a GGUF file")
        try:
            _, _, num_values = struct.unpack_from("<IQQ", raw, 4)
            values, at = {}, 24
            for _ in range(num_values):
                key, at = _string(raw, at)
                (kind,) = struct.unpack_from("<I", raw, at)
                values[key], at = _value(raw, at + 4, kind)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"{path} has a malformed header") from error
        return values


def _string(raw: mmap.mmap, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", raw, at)
    end = at + 8 + size
    return raw[at + 8 : end].decode("utf-8"), end


def _value(raw: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(raw, at)
    if kind == _ARRAY:
        item_kind, count = struct.unpack_from("<IQ", raw, at)
        at += 12
        items = []
        for _ in range(count):
            item, at = _value(raw, at, item_kind)
            items.append(item)
        return items, at
    number = _NUMBERS[kind]
    return struct.unpack_from(number, raw, at)[0], at + struct.calcsize(number)
