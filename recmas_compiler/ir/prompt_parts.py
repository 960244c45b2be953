"""What prompts begin with, before any record is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from recmas_runtime.formats.plan import PromptPart


def common_parts(one: Sequence[PromptPart], other: Sequence[PromptPart]) -> Iterator[PromptPart]:
    """Yield what two prompts both begin with, before the first slot of either."""
    for left, right in zip(one, other, strict=False):
        if "slot" in (left.kind, right.kind):
            return
        if left != right:
            if left.kind == right.kind == "text":
                pairs = zip(left.value, right.value, strict=False)
                equal = takewhile(lambda pair: pair[0] == pair[1], pairs)
                shared = "".join(letter for letter, _ in equal)
                # Half a word is hardly ever a token of its own.
                whole_words = shared[: max(map(shared.rfind, " \n")) + 1]
                yield PromptPart(kind="text", value=whole_words)
            return
        yield left
