"""How the results of tools are written for the model that called them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from recmas_runtime.prompts.tokenizer import Span
from recmas_runtime.tools.calls import result_block


@dataclass(frozen=True, kw_only=True)
class ResultForm:
    """What a model reads after its call; this one is plain text within its own turn."""

    def write(self, texts: Sequence[str]) -> tuple[str, tuple[Span, ...]]:
        """Return the results of calls as one text, and which of its characters are theirs."""
        written = "".join(map(result_block, texts))
        return written, ((0, len(written)),)


PLAIN_RESULTS: Final = ResultForm()
