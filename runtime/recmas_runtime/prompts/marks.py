"""Words that stand for slots and for what a record spells, while a chat template is rendered.

Templates that trim or escape text do not change them, because they are letters and digits; and no
other text of the prompt is taken for one, because none contains the salt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from recmas_runtime.prompts.tokenizer import Span, Tokenizer


@dataclass
class Marks:
    """Words in place of slots, and of control tokens that a record spells."""

    salt: str
    slots: list[str] = field(default_factory=list)
    spellings: list[str] = field(default_factory=list)

    @property
    def end(self) -> str:
        """The word for the end of a text."""
        return f"{self.salt}T0E"

    def for_slot(self, agent: str) -> str:
        """Return the word for the next slot."""
        self.slots.append(agent)
        return f"{self.salt}S{len(self.slots) - 1}E"

    def for_spelling(self, text: str) -> str:
        """Return the word for text that spells a control token."""
        self.spellings.append(text)
        return f"{self.salt}C{len(self.spellings) - 1}E"

    @cached_property
    def slot_pattern(self) -> re.Pattern[str]:
        """What finds slots; its group is the slot's number."""
        return re.compile(f"{self.salt}S([0-9]+)E")

    @cached_property
    def _spelling_pattern(self) -> re.Pattern[str]:
        return re.compile(f"{self.salt}C([0-9]+)E")

    def mark_controls(self, content: str, values: Sequence[Span], tokenizer: Tokenizer) -> str:
        """Put marks in place of control tokens that overlap with the text of `values`.

        Args:
            values: In order; they do not overlap.
        """
        # The tokenizer finds what a search would miss: tokens that a normalizer makes, or that
        # begin in a field and end outside.
        pieces: list[str] = []
        position = nearest = 0
        for first, last in tokenizer.control_spans(content):
            while nearest < len(values) and values[nearest][1] <= first:
                nearest += 1
            if nearest < len(values) and values[nearest][0] < last:
                pieces += (content[position:first], self.for_spelling(content[first:last]))
                position = last
        return "".join((*pieces, content[position:]))

    def restore(self, piece: str) -> tuple[str, list[Span]]:
        """Put the spellings back in place of their marks; return the text and where they are."""
        # Splitting at a pattern with one group gives text, number, text, ..., text.
        parts = self._spelling_pattern.split(piece)
        spans: list[Span] = []
        length = 0
        for index, part in enumerate(parts):
            if index % 2:
                parts[index] = spelling = self.spellings[int(part)]
                spans.append((length, length + len(spelling)))
            length += len(parts[index])
        return "".join(parts), spans


def unused_salt(text: str, literals: Iterable[str]) -> str:
    """Return a salt that no rendering of a text by a template that writes `literals` contains."""
    # Without space, because a template may strip two messages and so join their ends.
    dense = "".join(text.split())
    used = {number for found in (dense, *literals) for number in _SALT.findall(found)}
    number = next(n for n in range(len(used) + 1) if str(n) not in used)
    return f"recmas{number}x"


_SALT = re.compile("recmas([0-9]+)x")
