"""A backbone's tokenizer as its own file has it, held against that file.

transformers builds many tokenizers anew from the vocabulary alone, by the class that a folder
names, and takes the class's own split in the place of the one in tokenizer.json. Engines must get
the ids that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.sources import files_of
from recmas_compiler.spec.document.problems import show
from recmas_runtime.core.errors import fail
from recmas_runtime.prompts.exerciser import sample_texts

TOKENIZER_FILE: Final = "tokenizer.json"
_SHOWN_TOKENS: Final = 4


def load_tokenizer(
    folder: Path, load: Mapping[str, Any], *, source: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder: from its tokenizer.json if there is one.

    Where there is none, it is what transformers makes of the vocabulary that is there.

    Args:
        load: What every `from_pretrained` of this model gets.
        source: How errors name the backbone.

    Raises:
        RecmasError: RM202 if there is no fast tokenizer, or if it gives other tokens than the
            model's file.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, **load)
    if not tokenizer.is_fast:
        raise fail(
            "RM202",
            f"backbone {source!r} has no {TOKENIZER_FILE}, only a slow Python tokenizer",
            hint=f"Choose a backbone whose repository has a {TOKENIZER_FILE}.",
        )
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = _from_own_file(folder, load, usual=tokenizer)
        _compare(_whole(tokenizer.backend_tokenizer), folder / TOKENIZER_FILE, source)
    _whole(tokenizer.backend_tokenizer)
    return tokenizer


def _from_own_file(
    folder: Path, load: Mapping[str, Any], *, usual: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """Load tokenizer.json as it is, with the tokens that the folder's settings add to it.

    Special tokens that only the class of the usual tokenizer names keep their names.
    """
    own = PreTrainedTokenizerFast.from_pretrained(folder, **load)
    vocabulary = own.get_vocab()
    for name, token in usual.special_tokens_map.items():
        if getattr(own, name, None) is None and isinstance(token, str) and token in vocabulary:
            setattr(own, name, token)
    return own


def own_tokenizer_file(facts: BackboneFacts) -> Path | None:
    """Return the path of the tokenizer.json that a model is loaded with, None if there is none."""
    resolved = files_of(facts)
    file = resolved.folder / TOKENIZER_FILE
    return file if resolved.gguf_file is None and file.is_file() else None


def other_ids(
    written: Path, tokenizer: PreTrainedTokenizerBase, *, own_file: Path | None
) -> str | None:
    """Return in words where a bundle's tokenizer.json gives other ids than its model's tokenizer.

    Args:
        tokenizer: What transformers loaded.
        own_file: The model's own tokenizer.json, None where it has none.
    """
    found = _whole(tokenizers.Tokenizer.from_file(str(written)))
    others = {"that of transformers": tokenizer.backend_tokenizer}
    if own_file is not None:
        others["the model's own"] = _whole(tokenizers.Tokenizer.from_file(str(own_file)))
    for name, expected in others.items():
        difference = _first_difference(found, expected)
        if difference is not None:
            return f"the tokenizer is not {name}: {difference}"
    return None


def _compare(tokenizer: tokenizers.Tokenizer, file: Path, source: str) -> None:
    """Refuse a tokenizer that gives other ids than its file."""
    found = _first_difference(tokenizer, _whole(tokenizers.Tokenizer.from_file(str(file))))
    if found is not None:
        raise fail(
            "RM202",
            f"the tokenizer that transformers makes for backbone {source!r} is not that of its "
            f"{file.name}: {found}",
            hint="Remove from tokenizer_config.json what changes the tokenizer, or save "
            f"{file.name} anew with the tokenizer that the model was trained with.",
        )


def _first_difference(found: tokenizers.Tokenizer, expected: tokenizers.Tokenizer) -> str | None:
    """Return the first sample text that two tokenizers give different ids, in words."""
    theirs_added, ours_added = (
        {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        for tokenizer in (expected, found)
    )
    for text in _texts(sorted(theirs_added), ours_added - theirs_added):
        ours = found.encode(text, add_special_tokens=False)
        theirs = expected.encode(text, add_special_tokens=False)
        if ours.ids != theirs.ids:
            return (
                f"in {show(text)} it has {_part(ours, theirs)} in the place of "
                f"{_part(theirs, ours)}"
            )
    return None


def _whole(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Drop settings of a tokenizer's file that cut or pad whatever is encoded, in place."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _texts(tokens: Sequence[str], added: set[str]) -> Iterator[str]:
    """Give the texts to compare: all that spell no token which only the settings add."""
    return (
        text for text in sample_texts(tokens) if not any(token and token in text for token in added)
    )


def _part(shown: tokenizers.Encoding, other: tokenizers.Encoding) -> str:
    """Return a few tokens from where an encoding parts from another one."""
    same = [a == b for a, b in zip(shown.ids, other.ids, strict=False)]
    first = same.index(False) if False in same else len(same)
    return " ".join(shown.tokens[first : first + _SHOWN_TOKENS]) or "nothing"
