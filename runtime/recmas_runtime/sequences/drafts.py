"""Speculative decoding of one text: tokens are drafted, and verified by one engine call.

Decoding reads all weights for every token; a call of several positions reads them once. So a draft
of what may come next runs behind the last token, and as far as the model would have written the
same, its tokens are there. This is greedy decoding, and the text stays what it is without drafts.

Drafts come from prompt lookup: where the last few tokens stood before, in the prompt or in the
text, what followed them there is drafted (Saxena, "Prompt Lookup Decoding", 2023).

A call of several positions rounds otherwise than calls of one, and the cache rows that it writes
differ as much. That changes a choice only where the two largest logits are nearly equal. Whether
they are is looked at for every token; there the positions since the last ones that ran by
themselves run again one by one, and the choice is theirs.

Shape legend: S positions of a call, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from recmas_runtime.engines.interface import Floats
from recmas_runtime.formats.plan import SpeculationPlan
from recmas_runtime.prompts.render import Prompt, Tokens
from recmas_runtime.sequences.sequence_batch import SequenceBatch

# Between pieces of a prompt that do not follow one another: no token, so that nothing matches it.
_GAP: Final = -1
# Longer matches than that, beyond the least one, are not looked for: they foretell little more.
_FURTHER: Final = 4


class PromptLookup:
    """Drafts what followed the last tokens where they stood before, the longest match of them.

    A match of n tokens drafts at most 2^n: the longer it is, the further it foretells, and what is
    drafted in vain takes time.
    """

    def __init__(self, plan: SpeculationPlan, prompt: Prompt) -> None:
        self._plan = plan
        self._sizes = range(plan.min_match, plan.min_match + _FURTHER + 1)
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        for item in prompt.items:
            self.push(item.ids if isinstance(item, Tokens) else (_GAP,))

    def push(self, ids: Sequence[int]) -> None:
        """Add tokens of the prompt or of the text."""
        known = self._ids
        for token_id in ids:
            place = len(known)
            for size in self._sizes:
                if size <= place:
                    self._behind[tuple(known[place - size :])] = place
            known.append(token_id)

    def draft(self, most: int) -> tuple[int, ...]:
        """Return what may follow, at most so many tokens; nothing if the last ones are new."""
        for size in reversed(self._sizes):
            place = self._behind.get(tuple(self._ids[-size:]))
            count = min(most, self._plan.max_draft, 2**size)
            if place is not None and count > 0:
                # What followed may reach to the end, and then goes on as it has begun.
                found = self._ids[place : place + count]
                while len(found) < count:
                    found += found[: count - len(found)]
                return tuple(found[: found.index(_GAP)] if _GAP in found else found)
        return ()


class DraftedRow:
    """The one sequence of a batch while its text is written with drafts.

    Args:
        margin: How far the largest logit must be ahead where positions ran beside others.

    Attributes:
        num_drafted: Tokens that were drafted and have run.
        num_accepted: Those of them that are part of the text.
        num_reread: Choices that were too close, and made again.
    """

    def __init__(self, sequences: SequenceBatch, lookup: PromptLookup, margin: float) -> None:
        self._sequences = sequences
        self._lookup = lookup
        self._margin = margin
        # What has run ahead of the sequence: tokens, with the logits [S, V] at the last one of the
        # sequence and at each of them.
        self._ahead: tuple[int, ...] = ()
        self._logits: Floats | None = None
        self._at = 0
        # What was fed since positions ran beside others, and how many positions there were before.
        self._fed: list[tuple[int, ...]] = []
        self._exact_length: int | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_reread = 0

    @property
    def length(self) -> int:
        """Positions of the sequence."""
        return int(self._sequences.lengths[0])

    def logits(self) -> Floats:
        """Return the logits [1, V] of the next token; the largest is that without drafts."""
        if self._logits is None:
            found = self._sequences.logits()
        else:
            found = self._logits[self._at : self._at + 1]
        if self._exact_length is None or _lead(found[0]) >= self._margin:
            return found
        self.num_reread += 1
        self._forget_draft()
        self._sequences.go_back(self._exact_length)
        for ids in self._fed:
            self._sequences.feed([ids])
        self._exact_length, self._fed = None, []
        return self._sequences.logits()

    def feed(self, ids: tuple[int, ...], *, room: int) -> None:
        """Go on behind tokens, which may have run already; drafts at most `room` more."""
        self._lookup.push(ids)
        if self._logits is not None and ids == self._ahead[self._at : self._at + 1]:
            self._at += 1
            self.num_accepted += 1
            self._fed.append(ids)
            self._sequences.advance()
            return
        self._forget_draft()
        # Results of a tool run as they do without drafts.
        draft = self._lookup.draft(room) if len(ids) == 1 else ()
        if draft:
            before = self.length
            hidden_SD = self._sequences.read_draft((*ids, *draft))
            if len(hidden_SD) > 1:
                self._ahead = draft[: len(hidden_SD) - 1]
                self._logits = self._sequences.engine.logits(hidden_SD)
                self.num_drafted += len(self._ahead)
                if self._exact_length is None:
                    self._exact_length = before
        else:
            self._sequences.feed([ids])
        if self._exact_length is not None:
            self._fed.append(ids)

    def _forget_draft(self) -> None:
        self._ahead, self._logits, self._at = (), None, 0


def _lead(logits_V: Floats) -> float:
    """Return how far the largest logit is ahead of the second."""
    first = int(logits_V.argmax())
    others = (logits_V[:first].max(initial=-np.inf), logits_V[first + 1 :].max(initial=-np.inf))
    return float(logits_V[first]) - float(max(others))
