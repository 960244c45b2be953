"""Words that stand for slots, for what a record spells and for the ends of its fields' texts.

They are there while a chat template is rendered.

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
    """Words in place of slots and of control tokens that a record spells, and around values."""

    salt: str
    slots: list[str] = field(default_factory=list)
    spellings: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    @property
    def end(self) -> str:
        """The word for the end of a text."""
        return f"{self.salt}T0E"

    def for_slot(self, agent: str) -> str:
        """Return the word for the next slot."""
        self.slots.append(agent)
        return self.slot_word(len(self.slots) - 1)

    def slot_word(self, number: int) -> str:
        """Return the word for a slot by its number."""
        return f"{self.salt}S{number}E"

    def for_spelling(self, text: str) -> str:
        """Return the word for text that spells a control token."""
        self.spellings.append(text)
        return f"{self.salt}C{len(self.spellings) - 1}E"

    def around_value(self, name: str, text: str) -> str:
        """Return the text of a field between words that tell where it begins and ends."""
        self.values.append(name)
        bound = f"{self.salt}F{len(self.values) - 1}E"
        return f"{bound}{text}{bound}"

    @cached_property
    def value_pattern(self) -> re.Pattern[str]:
        """What finds the ends of values; its group is the value's number."""
        return re.compile(f"{self.salt}F([0-9]+)E")

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
        return self.mark_values(content, values, tokenizer)[0]

    def mark_values(
        self, content: str, values: Sequence[Span], tokenizer: Tokenizer
    ) -> tuple[str, list[Span]]:
        """Do what `mark_controls` does; return also where the values are then.

        A mark that stands for text inside and outside of a value counts as part of it.
        """
        # The tokenizer finds what a search would miss: tokens that a normalizer makes, or that
        # begin in a field and end outside.
        pieces: list[str] = []
        replaced: list[tuple[int, int, int]] = []  # first, last, and how long the mark is
        position = nearest = 0
        for first, last in tokenizer.control_spans(content):
            while nearest < len(values) and values[nearest][1] <= first:
                nearest += 1
            if nearest < len(values) and values[nearest][0] < last:
                mark = self.for_spelling(content[first:last])
                pieces += (content[position:first], mark)
                replaced.append((first, last, len(mark)))
                position = last

        def moved(at: int, *, is_end: bool) -> int:
            shift = 0
            for first, last, length in replaced:
                if last <= at:
                    shift += length - (last - first)
                elif first < at:
                    return first + shift + (length if is_end else 0)
            return at + shift

        spans = [(moved(a, is_end=False), moved(b, is_end=True)) for a, b in values]
        return "".join((*pieces, content[position:])), spans

    def spelling_lengths(self, piece: str) -> list[int]:
        """Return how long each mark of a spelling is in a piece, in order."""
        return [len(found[0]) for found in self._spelling_pattern.finditer(piece)]

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
