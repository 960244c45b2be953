"""How many tokens a text has, without transformers: by a tokenizer file or a GGUF's vocabulary.

Engines get their tokenizer from transformers. Of a GGUF file only the header is read here, none of
its weights. Like transformers this takes no notice of the pre-tokenizer that the file names, so
that both count the same.
"""

from __future__ import annotations

import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import pre_tokenizers

from recmas_compiler.backbones.sources import files_of
from recmas_compiler.ir.ops import System
from recmas_compiler.spec.checks.prefix_reuse import count_tokens

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


def read_gguf_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """Return the byte-level BPE tokenizer of a GGUF file, or None if it is of another kind."""
    values = read_gguf_values(path)
    if values.get("tokenizer.ggml.model") != "gpt2":
        return None
    tokens, merges = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


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


class TokenCounter:
    """Counts tokens with the tokenizers of a system's backbones."""

    def __init__(self, system: System) -> None:
        self._system = system

    def __call__(self, backbone: str, text: str) -> int | None:
        """Return the tokens of `text`, or None if the backbone has no tokenizer that can count."""
        resolved = files_of(self._system.backbones[backbone].facts)
        if resolved.gguf_file is None:
            return count_tokens(resolved.folder / "tokenizer.json", text)
        tokenizer = _gguf_tokenizer(resolved.folder / resolved.gguf_file)
        return None if tokenizer is None else len(tokenizer.encode(text).ids)


@lru_cache(maxsize=4)
def _gguf_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    return read_gguf_tokenizer(path)
