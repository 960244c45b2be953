"""Where in a rendered prompt its fields and the generation prompt are, in tokens.

A chat template may trim white space, so what tells where a field begins cannot stay in the text:
the conversation is rendered a second time with words around the fields, and what lies before each
word is counted, white space apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from recmas_runtime.core.errors import fail
from recmas_runtime.prompts.marks import Marks
from recmas_runtime.prompts.tokenizer import Span, Tokenizer


@dataclass(frozen=True, kw_only=True)
class Places:
    """The same conversation rendered in three ways; slots and spellings are marks in all of them.

    Attributes:
        whole: As it is tokenized.
        opening: Without the generation prompt.
        bounded: With words around the values of fields.
        values: The field of each value, by its number.
    """

    whole: str
    opening: str
    bounded: str
    values: Sequence[str]

    def find(self, tokenizer: Tokenizer, marks: Marks) -> tuple[int, dict[str, tuple[int, ...]]]:
        """Return how many tokens the generation prompt has, and by field the tokens of its values.

        Tokens are counted from the prompt's first one, slots left out.

        Raises:
            RecmasError: RM206 if the template shows a value otherwise than as it is.
        """
        spans = list(_token_spans(self.whole, tokenizer, marks))
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], self._pairs()))
        # What the template closes a conversation with may begin like the assistant's turn, in the
        # middle of a token.
        num_closing = sum(last > same for _, last in spans)
        fields: dict[str, list[int]] = {name: [] for name in self.values}
        for number, (begin, end) in self._value_spans(marks).items():
            fields[self.values[number]] += (
                index for index, (first, last) in enumerate(spans) if first < end and last > begin
            )
        return num_closing, {name: tuple(sorted(set(found))) for name, found in fields.items()}

    def _pairs(self) -> Iterator[tuple[str, str]]:
        return zip(self.whole, self.opening, strict=False)

    def _value_spans(self, marks: Marks) -> dict[int, Span]:
        """Return where each value is in the whole text, without white space at its ends."""
        # Splitting at a pattern with one group gives text, number, text, ..., text.
        parts = marks.value_pattern.split(self.bounded)
        letters = [place for place, char in enumerate(self.whole) if not char.isspace()]
        counts: dict[int, list[int]] = {}
        so_far = 0
        for index, part in enumerate(parts):
            if index % 2:
                counts.setdefault(int(part), []).append(so_far)
            else:
                so_far += len("".join(part.split()))
        if so_far != len(letters) or any(len(found) != 2 for found in counts.values()):
            raise fail(
                "RM206",
                "the chat template shows the fields of a prompt otherwise than as they are, so it "
                "cannot be told which tokens are theirs",
                hint="Give the backbone a `template` of your own, a file or `none`.",
            )
        return {
            number: (letters[begin], letters[end - 1] + 1)
            for number, (begin, end) in counts.items()
            if end > begin
        }


def _token_spans(whole: str, tokenizer: Tokenizer, marks: Marks) -> Iterator[Span]:
    """Yield where each token of a rendered prompt is, in characters of it with its marks."""
    at = 0
    pieces = marks.slot_pattern.split(whole)
    for index, piece in enumerate(pieces):
        if index % 2:
            at += len(marks.slot_word(int(piece)))
            continue
        text, spellings = marks.restore(piece)
        if text:
            placed = tokenizer.encode_placed(text, spellings, continues=index > 0)
            starts = [start for _, start in placed]
            shift = _shifts(spellings, marks.spelling_lengths(piece))
            for start, end in zip(starts, _ends(starts, len(text)), strict=True):
                yield at + start + shift(start), at + end + shift(end)
        at += len(piece)


def _ends(starts: Sequence[int], length: int) -> list[int]:
    """Return where each token ends: where the next one begins that does not begin with it."""
    ends = [length] * len(starts)
    for index in range(len(starts) - 2, -1, -1):
        later = starts[index + 1]
        ends[index] = later if later > starts[index] else ends[index + 1]
    return ends


def _shifts(spellings: Sequence[Span], lengths: Sequence[int]) -> Callable[[int], int]:
    """Return by how much a place in restored text lies further behind where marks stand."""
    ends = [last for _, last in spellings]
    grown = [mark - (b - a) for (a, b), mark in zip(spellings, lengths, strict=True)]
    sums = list(accumulate(grown, initial=0))
    return lambda place: sums[bisect_right(ends, place)]
