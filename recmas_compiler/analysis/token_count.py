"""How many tokens a text has, without transformers: by a tokenizer file or a GGUF's vocabulary.

Engines get their tokenizer from the same files. Of a GGUF file only the header is read.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import tokenizers

from recmas_compiler.backbones.gguf_files.header import GgufError, read_values
from recmas_compiler.backbones.gguf_files.tokenizer import make_tokenizer
from recmas_compiler.backbones.sources import files_of
from recmas_compiler.ir.ops import System
from recmas_compiler.spec.checks.prefix_reuse import count_tokens


class TokenCounter:
    """Counts tokens with the tokenizers of a system's backbones."""

    def __init__(self, system: System) -> None:
        self._system = system

    def __call__(self, backbone: str, text: str) -> int | None:
        """Return the tokens of `text`, or None if the backbone has no tokenizer that can count."""
        resolved = files_of(self._system.backbones[backbone].facts)
        if resolved.gguf_path is None:
            return count_tokens(resolved.folder / "tokenizer.json", text)
        tokenizer = _gguf_tokenizer(resolved.gguf_path)
        return None if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=4)
def _gguf_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    try:
        return make_tokenizer(read_values(path))
    except GgufError:
        return None
