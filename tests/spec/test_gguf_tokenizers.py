"""Tokenizers of GGUF files, made of their vocabularies without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from recmas_compiler.backbones.gguf_files.header import GgufError, read_header
from recmas_compiler.backbones.gguf_files.tokenizer import (
    check_tokenizer,
    end_token_ids,
    make_tokenizer,
    special_tokens,
)

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6

SPLITS = {
    "gpt-2": ["Ab", "12", "345", "\u010a\u010a", "\u0120x"],
    "smollm": ["Ab", "1", "2", "3", "4", "5", "\u010a\u010a", "\u0120x"],
    "qwen2": ["Ab", "1", "2", "3", "4", "5", "\u010a\u010a", "\u0120x"],
    "llama-bpe": ["Ab", "123", "4", "5", "\u010a\u010a", "\u0120x"],
}


def byte_level(split: str | None, **values: Any) -> dict[str, Any]:
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("A", "b"), ("1", "2"), ("3", "4"), ("34", "5"), ("\u010a", "\u010a")]
    merges += [("\u0120", "x")]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": [*letters, *(a + b for a, b in merges), "123"],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        **values,
    }


@pytest.mark.parametrize("name", SPLITS)
def test_gguf_files_name_how_words_are_split(name: str) -> None:
    assert make_tokenizer(byte_level(name)).encode("Ab12345\n\n x").tokens == SPLITS[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [("from-the-future", "names the pre-tokenizer `from-the-future`"), (None, "names no pre-")],
)
def test_an_unknown_split_is_refused(name: str | None, said: str) -> None:
    with pytest.raises(GgufError, match=said) as caught:
        check_tokenizer(byte_level(name))
    assert "smollm" in caught.value.hint


def sentencepiece(**values: Any) -> dict[str, Any]:
    """Return a vocabulary whose scores join in another order than its ids."""
    pieces = {"\u2581": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -2.0}
    pieces |= {"\u2581a": -3.0}
    special = {"<unk>": _CONTROL, "<s>": _CONTROL, "</s>": _CONTROL, "  ": _USER_DEFINED}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *bytes_, *pieces],
        "tokenizer.ggml.scores": [0.0] * (len(special) + 256) + [*pieces.values()],
        "tokenizer.ggml.token_type": [*special.values(), *[_BYTE] * 256, *[_NORMAL] * len(pieces)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **values,
    }


def test_sentencepiece_joins_by_score() -> None:
    tokenizer = make_tokenizer(sentencepiece())
    assert tokenizer.encode("abc", add_special_tokens=False).tokens == ["\u2581a", "bc"]
    plain = make_tokenizer(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    assert plain.encode("abc", add_special_tokens=False).tokens == ["a", "bc"]
    assert plain.encode("abc").tokens == ["<s>", "a", "bc"]
    # user-defined tokens are found in the text as it is, before spaces are written as pieces
    assert plain.encode("a  b a", add_special_tokens=False).tokens == ["a", "  ", "b", "\u2581a"]
    accent = plain.encode("\u00e9", add_special_tokens=False)
    assert accent.tokens == ["<0xC3>", "<0xA9>"]
    assert plain.decode(plain.encode("ab a\u00e9").ids) == "ab a\u00e9"


def test_ends_of_an_answer() -> None:
    assert end_token_ids(sentencepiece()) == [2]
    assert special_tokens(sentencepiece()) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    named = sentencepiece(**{"tokenizer.ggml.eot_token_id": 5})
    assert end_token_ids(named) == [2, 5]
    turns = sentencepiece()
    turns["tokenizer.ggml.tokens"][0] = "<end_of_turn>"  # a control token that no key names
    assert end_token_ids(turns) == [0, 2]


@pytest.mark.parametrize("content", [b"GGUF", b"GGML" + b"\0" * 40, b"GGUF" + b"\xff" * 40])
def test_malformed_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=r"GGUF"):
        read_header(path)


@pytest.mark.parametrize("count", [1, 2**40, 2**63])
def test_a_header_that_promises_too_much(count: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + (0).to_bytes(8, "little") + count.to_bytes(8, "little"))
    with pytest.raises(GgufError, match="cut off"):
        read_header(path)
