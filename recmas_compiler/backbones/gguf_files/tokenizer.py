"""The tokenizer that a GGUF file describes, as llama.cpp makes it.

A GGUF file holds a vocabulary and merges, or scores instead of merges, and of the split before them
only a name. What the name stands for is a table here: libraries know some of the names and take a
split of their own for the rest, which gives other ids, above all around numbers and line breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from recmas_compiler.backbones.gguf_files.header import GgufError

# Kinds of `tokenizer.ggml.model`.
_BYTE_LEVEL_BPE: Final = "gpt2"
_SENTENCEPIECE: Final = "llama"
# Kinds of tokens in `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4
_WORD_START: Final = "\u2581"

# Keys of the special tokens, by what chat templates call them.
_NAMED: Final[Mapping[str, str]] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Ids that end an answer, and the tokens that llama.cpp takes for the end of a turn where a file
# names none.
_ENDS: Final = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
_END_OF_TURN: Final = "tokenizer.ggml.eot_token_id"
_USUAL_ENDS_OF_TURN: Final = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


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


def check_tokenizer(values: Mapping[str, Any]) -> None:
    """Refuse a file whose tokenizer recmas cannot make, without making it.

    Raises:
        GgufError: The file describes no tokenizer, one of another kind, or names a split that
            recmas does not know.
    """
    tokens = values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise GgufError(
            "holds no vocabulary (`tokenizer.ggml.tokens`)",
            "Convert the model anew with a current llama.cpp.",
        )
    kind = values.get("tokenizer.ggml.model")
    if kind not in _MAKERS:
        raise GgufError(
            f"has a tokenizer of the kind `{kind}`, which recmas does not make",
            f"Use the model's safetensors repository. Known kinds: {', '.join(_MAKERS)}.",
        )
    needed = "merges" if kind == _BYTE_LEVEL_BPE else "scores"
    if not isinstance(values.get(f"tokenizer.ggml.{needed}"), list):
        raise GgufError(
            f"has a vocabulary without its {needed} (`tokenizer.ggml.{needed}`)",
            "Convert the model anew with a current llama.cpp.",
        )
    if kind == _BYTE_LEVEL_BPE:
        _split_of(values)


def make_tokenizer(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Return the tokenizer of a GGUF file, with its added tokens.

    Control tokens are special; tokens that the file calls user-defined are found in any text before
    it is split, as llama.cpp finds them.

    Raises:
        GgufError: See `check_tokenizer`.
    """
    check_tokenizer(values)
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    tokenizer = _MAKERS[values["tokenizer.ggml.model"]](values)
    kinds = values.get("tokenizer.ggml.token_type") or []
    named = set(special_tokens(values).values())
    added = []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL or token in named:
            added.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            added.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_tokens(added)
    _add_first_token(tokenizer, values)
    return tokenizer


def special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the special tokens that a file names, by what templates call them."""
    tokens = values.get("tokenizer.ggml.tokens") or []
    ids = {name: values.get(key) for name, key in _NAMED.items()}
    return {
        name: tokens[token_id]
        for name, token_id in ids.items()
        if isinstance(token_id, int) and 0 <= token_id < len(tokens)
    }


def end_token_ids(values: Mapping[str, Any]) -> list[int]:
    """Return the ids that end an answer: those that a file names, and the end of a turn."""
    found = {values[key] for key in _ENDS if isinstance(values.get(key), int)}
    if _END_OF_TURN not in values:
        tokens = values.get("tokenizer.ggml.tokens") or []
        kinds = values.get("tokenizer.ggml.token_type") or []
        found |= {
            token_id
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
            if kind == _CONTROL and token in _USUAL_ENDS_OF_TURN
        }
    return sorted(found)


def _split_of(values: Mapping[str, Any]) -> _Split:
    name = values.get("tokenizer.ggml.pre")
    split = _SPLITS.get(str(name))
    if split is None:
        said = f"names the pre-tokenizer `{name}`" if name else "names no pre-tokenizer"
        raise GgufError(
            f"{said}, so its tokens cannot be told",
            f"Use the model's safetensors repository. Known pre-tokenizers: {', '.join(_SPLITS)}.",
        )
    return split


def _byte_level_bpe(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    split = _split_of(values)
    vocabulary = _ids(values["tokenizer.ggml.tokens"])
    pairs = [_pair(merge) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole_words))
    tokenizer.pre_tokenizer = split.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _ids(tokens: Iterable[str]) -> dict[str, int]:
    """Return tokens with their ids; of a token that stands there twice the first, as llama.cpp."""
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        vocabulary.setdefault(token, token_id)
    return vocabulary


def _sentencepiece(values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    kinds = values.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = _ids(tokens)
    plain = {t: i for t, i in vocabulary.items() if kinds[i] not in (_CONTROL, _USER_DEFINED)}
    unknown = special_tokens(values).get("unk_token")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            _merges_of(plain, values["tokenizer.ggml.scores"]),
            unk_token=unknown,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    spaces = normalizers.Replace(" ", _WORD_START)
    begins_with_space = values.get("tokenizer.ggml.add_space_prefix", True)
    if begins_with_space:
        before = normalizers.Prepend(_WORD_START)
        tokenizer.normalizer = normalizers.Sequence([before, spaces])
    else:
        tokenizer.normalizer = spaces
    stages = [decoders.Replace(_WORD_START, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins_with_space:
        stages.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(stages)
    return tokenizer


def _merges_of(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the pairs that make a token, best score first: SentencePiece joins by score alone."""
    found = []
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], token_id, left, right, token, cut))
    found.sort()
    return [(token[:cut], token[cut:]) for *_, token, cut in found]


def _add_first_token(tokenizer: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    """Put the token that starts a text before every text, if the file says so."""
    is_usual = values["tokenizer.ggml.model"] == _SENTENCEPIECE
    first = special_tokens(values).get("bos_token")
    if first is None or not values.get("tokenizer.ggml.add_bos_token", is_usual):
        return
    first_id = values["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A",
        pair=f"{first} $A {first} $B:1",
        special_tokens=[(first, first_id)],
    )


_MAKERS: Final[Mapping[str, Callable[[Mapping[str, Any]], tokenizers.Tokenizer]]] = {
    _BYTE_LEVEL_BPE: _byte_level_bpe,
    _SENTENCEPIECE: _sentencepiece,
}
