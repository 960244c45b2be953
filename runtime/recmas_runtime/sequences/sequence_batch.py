"""A batch of sequences: the rows of one cache while a plan runs, and what came out of them last.

Shape legend: R rows, S positions of a call, T positions of a whole prompt, d width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.interface import (
    Backbone,
    Floats,
    Indices,
    KeyValueRows,
    Operands,
    behind_sink,
    handed_rows,
)
from recmas_runtime.engines.onnx.caches import Cache
from recmas_runtime.formats.layers import cache_tensors, has_states
from recmas_runtime.formats.messages import Layers
from recmas_runtime.formats.plan import cache_capacity
from recmas_runtime.prompts.render import common_prefix
from recmas_runtime.sequences.moved_keys import moved_keys

# Of a prompt: behind cached rows a batch's prompts may run row by row, at four fifths of the speed,
# so a copy must spare more than that.
MIN_SHARED_PREFIX_FRACTION = 0.25
# Attention pays for every row of capacity, so text gets room as it grows; a step up copies once.
DECODE_HEADROOM = 128


@dataclass(frozen=True, kw_only=True)
class SavedRow:
    """The layer states of one sequence as they were behind the leading tokens of its prompt.

    Attributes:
        ids: These tokens.
        states: Of all sequences of the cache it lay in; see `KeyValueRows.save_states`.
        row: Its place in that cache.
    """

    ids: tuple[int, ...]
    states: Any
    row: int


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one sequence's cache.

    Attributes:
        tensors: [H, P, D], in the order of `formats.layers.cache_tensors`.
        position: Where the first of them was computed; keys know their place.
        seen_by: The layers that they are handed over to; None for all.
        sink: The first row of that cache, if they do not begin with it.
    """

    tensors: tuple[NDArray[Any], ...]
    position: int
    seen_by: Layers | None = None
    sink: Rows | None = None

    @property
    def count(self) -> int:
        """How many rows there are, P."""
        return int(self.tensors[0].shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(kw_only=True)
class SequenceBatch:
    """Rows that go through a backbone together. Its cache outlives it, for another batch.

    Where layers keep states, positions run once and in order: what is in the cache is gone back to
    by `begin` only.

    Attributes:
        inner: Operands of the inner links, one group for each agent.
        prefixes: For each row the leading token ids of its prompt, which a later one may share.
        lengths: [R], positions in the cache that are real.
        thought: [R, 1, d], the hidden state at the last real position.
        next_embeds: [R, 1, d], its inner link's output.
        owner: The batch in whose cache this one's lies; None if it has a cache of its own.
        hidden: For each row the states [T, d] at the positions of its last prompt, where they are
            kept.
        num_foreign: For each row, how many rows of other sequences come before its prompt.
    """

    cache: KeyValueRows
    engine: Backbone[Any]
    inner: Operands
    prefixes: list[tuple[int, ...]]
    lengths: Indices
    thought: Floats
    next_embeds: Floats
    owner: SequenceBatch | None = None
    # Of each row the states at all its positions, and how many rows of others come first.
    hidden: list[Floats] = field(default_factory=list)
    num_foreign: list[int] = field(default_factory=list)
    # Of each row, the positions that its layer states have seen, and what it began with.
    _stand: Indices = field(init=False)
    _begun: list[SavedRow | None] = field(init=False)
    _release_cache: Callable[[], object] = field(init=False)

    def __post_init__(self) -> None:
        self._stand = self.lengths
        self._begun = []
        self.num_foreign = self.num_foreign or [0] * len(self.lengths)
        if self.owner is None:
            self._hold(self.cache)

    @classmethod
    def empty(
        cls, engine: Backbone[Any], inner: Operands, *, rows: int, capacity: int
    ) -> SequenceBatch:
        """Return a batch with nothing in its cache."""
        nothing = np.zeros((rows, 1, engine.entry.width), np.float32)
        return cls(
            cache=engine.new_cache(rows, capacity),
            engine=engine,
            inner=inner,
            prefixes=[()] * rows,
            lengths=np.zeros(rows, np.int64),
            thought=nothing,
            next_embeds=nothing,
        )

    def logits(self) -> Floats:
        """Return the logits [R, V] of the next token."""
        return self.engine.logits(np.ascontiguousarray(self.thought[:, 0]))

    @cached_property
    def keeps_states(self) -> bool:
        """Whether a layer of the backbone keeps a state; asked for every token."""
        return has_states(self.engine.entry.layers)

    def begin(self, saved: Sequence[SavedRow | None], source: SequenceBatch) -> None:
        """Go back to states that were saved, and in rows without any to the very beginning.

        Args:
            source: The batch whose cache has the rows of the same tokens; it stays as it is.
        """
        kept = np.array([0 if row is None else len(row.ids) for row in saved], np.int64)
        if source is not self and kept.any():
            self.make_room(int(kept.max()))
            places = [0 if row is None else row.row for row in saved]
            self.cache.copy_rows(source.cache, places, int(kept.max()))
        # The engine begins sequences anew that are written from their first position on.
        by_copy: dict[int, dict[int, SavedRow]] = {}
        for place, row in enumerate(saved):
            if row is not None:
                by_copy.setdefault(id(row.states), {})[place] = row
        for rows in by_copy.values():
            states = next(iter(rows.values())).states
            self.cache.restore_states(states, {place: row.row for place, row in rows.items()})
        self.lengths = self._stand = kept
        self._begun = list(saved) if source is self else []

    def prefill(
        self,
        embeds: Sequence[Floats],
        kept: Sequence[int],
        stops: Mapping[str, Sequence[int]] | None = None,
        *,
        keep_hidden: bool = False,
    ) -> dict[str, list[SavedRow | None]]:
        """Run prompts [T, d]; of each row, fewer than T leading positions are in the cache.

        Args:
            keep_hidden: Leave the states at all positions in `hidden`; those of positions that are
                in the cache are still there from before.
            stops: By name, for each row the number of leading positions behind which its states are
                saved; 0 for none. None of them is less than what is kept of that row.

        Returns what was saved.
        """
        named = {} if stops is None else stops
        rows = range(len(embeds))
        before = self.hidden or [row[:0] for row in embeds]
        self.hidden = (
            [states[:count] for states, count in zip(before, kept, strict=True)]
            if keep_hidden
            else []
        )
        saved: dict[str, list[SavedRow | None]] = {name: [None for _ in rows] for name in named}
        # Every row comes to its stops in ascending order, whatever their order in others.
        order = [sorted(named, key=lambda name: named[name][row]) for row in rows]
        at = list(kept)
        # What was restored in all rows is what is saved, as long as nothing has run.
        copies = [row for row in self._begun if row is not None]
        self._begun = []
        for turn in range(len(named)):
            names = [in_order[turn] for in_order in order]
            until = [max(named[name][row], at[row]) for row, name in enumerate(names)]
            if until != at:
                copies = []  # makes room for another
                self._run(embeds, at, until)
                at = until
            if len(copies) < len(rows):
                states = self.cache.save_states()
                copies = [
                    SavedRow(ids=self.prefixes[row][: at[row]], states=states, row=row)
                    for row in rows
                ]
            for row, name in enumerate(names):
                if named[name][row]:
                    assert named[name][row] == at[row], "states do not go back to where they were"
                    saved[name][row] = copies[row]
        self._run(embeds, at, [len(sequence) for sequence in embeds])
        return saved

    def _run(self, embeds: Sequence[Floats], starts: Sequence[int], ends: Sequence[int]) -> None:
        """Run a part of each prompt, which some rows may have nothing of."""
        positions = max(end - start for start, end in zip(starts, ends, strict=True))
        if self.keeps_states:
            assert self._stand.tolist() == list(starts), "states stand behind other positions"
        if self.keeps_states or any(self.num_foreign):
            # A row that started earlier than it must would run positions a second time.
            self.make_room(max(starts) + positions)
        self.make_room(max(ends))
        parts = [sequence[:end] for sequence, end in zip(embeds, ends, strict=True)]
        inputs, first, last = ragged_window(parts, starts, self.cache.capacity)
        hidden, self.thought, self.next_embeds = self.engine.forward(
            self.cache, inputs, first, last, self.inner
        )
        self.lengths = self._stand = np.array(ends, np.int64)
        self.hidden = [
            np.concatenate([known[:start], states[: end - start]])
            for known, states, start, end in zip(self.hidden, hidden, first, ends, strict=False)
        ]

    def begin_own(self) -> None:
        """Note that the next prompts begin with nothing of other sequences."""
        if any(self.num_foreign):
            self.num_foreign = [0] * len(self.num_foreign)
            self.prefixes = [()] * len(self.prefixes)

    @property
    def end(self) -> tuple[Indices, Floats, Floats]:
        """Where each row's prompt ends, and what came out there, to go back to."""
        return self.lengths, self.thought, self.next_embeds

    @end.setter
    def end(self, end: tuple[Indices, Floats, Floats]) -> None:
        self.lengths, self.thought, self.next_embeds = end
        if not self.keeps_states:
            self._stand = self.lengths

    def take_rows(self, rows: Sequence[Sequence[Rows]]) -> None:
        """Begin each sequence with rows of others, one piece behind the other.

        What was in the cache is gone. Prompts are prefilled behind `num_foreign` positions.
        """
        rows = [behind_sink(pieces) for pieces in rows]
        self.num_foreign = [sum(piece.count for piece in pieces) for pieces in rows]
        self.prefixes = [()] * len(rows)
        most = max(self.num_foreign)
        self.make_room(most)
        values = []
        for index, tensor in enumerate(cache_tensors(self.engine.entry.layers)):
            whole = np.zeros(tensor.whole(len(rows), most), np.float32)
            for row, pieces in enumerate(rows):
                at = 0
                for piece in pieces:
                    turned = self._turned(tensor.name, piece.tensors[index], piece, at)
                    whole[row, :, at : at + piece.count] = turned
                    at += piece.count
            values.append(whole)
        self.cache.write_rows(values)
        self.lengths = self._stand = np.array(self.num_foreign, np.int64)
        for row, pieces in enumerate(rows):
            told = ((piece.count, piece.position, piece.seen_by) for piece in pieces)
            self.cache.hide_rows(row, handed_rows(told))

    def _turned(self, name: str, rows: NDArray[Any], piece: Rows, position: int) -> NDArray[Any]:
        """Return one tensor of a piece of rows as it is at another position."""
        offset = position - piece.position
        if offset == 0:
            return rows
        positions = self.engine.entry.row_positions
        assert positions is not None, "a bundle whose rows move tells how"
        return moved_keys(rows, positions.of_tensor(name), offset)

    def read_rows(self, row: int, first: int, last: int) -> Rows:
        """Return a copy of some rows of one sequence."""
        tensors = self.cache.read_rows([row], last)
        cut = tuple(array[0, :, first:last] for array in tensors)
        top = Rows(tensors=tuple(array[0, :, :1] for array in tensors), position=0)
        return Rows(tensors=cut, position=first, sink=top if first else None)

    def copy_shared_prefix(
        self,
        other: SequenceBatch,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        records: int,
    ) -> None:
        """Copy another batch's rows of a shared prefix, where it is a good part of the prompts.

        The other one is of the same backbone and records; it stays as it is. Prompts are the
        leading token ids, lengths count all positions of each.
        """
        sources, common = [], []
        for row, (ids, length) in enumerate(zip(prompts, lengths, strict=True)):
            shared = {
                source: common_prefix(other.prefixes[source], ids)
                for source in range(row % records, len(other.prefixes), records)
            }
            source = max(shared, key=shared.__getitem__)
            sources.append(source)
            worth_it = shared[source] >= MIN_SHARED_PREFIX_FRACTION * length
            common.append(shared[source] if worth_it else 0)
        if not any(common):
            return
        # Whole prompts, for what is copied now would not move along before they have run.
        self.make_room(max(lengths))
        self.cache.copy_rows(other.cache, sources, max(common))
        self.prefixes = [tuple(ids[:count]) for ids, count in zip(prompts, common, strict=True)]

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Run one or more token ids of every row behind what is there."""
        counts = np.array([len(ids) for ids in tokens], np.int64)
        self.make_room(int(self.lengths.max() + counts.max()))
        _, self.thought, self.next_embeds = self._read(tokens, self.lengths)
        self.lengths = self._stand = self.lengths + counts

    def read_draft(self, ids: Sequence[int]) -> Floats:
        """Run a token of the one row, and what is drafted behind it; go on behind the first.

        Returns hidden states [n, d] of the first n of them: a shared engine may leave the draft.
        Behind each further one `advance` goes on.
        """
        start = self.lengths
        self.make_room(int(start[0]) + len(ids))
        embeds = self.engine.embed(np.array([ids], np.int64))
        hidden: Floats = self.engine.read_draft(self.cache, embeds, start, self.inner)[0]
        self.thought = hidden[:1, None]
        self.advance()
        return hidden

    def advance(self) -> None:
        """Go on behind the next position, which has run."""
        self.lengths = self._stand = self.lengths + 1

    def go_back(self, length: int) -> None:
        """Forget the one row's positions from `length` on; what is fed next begins there."""
        self.lengths = self._stand = np.array([length], np.int64)

    def look_ahead(self, tokens: Sequence[Sequence[int]]) -> Floats:
        """Return the hidden states [R, S, d] of one or more token ids of every row.

        The sequences stay as they are: what these tokens write is overwritten by what follows.
        """
        saved = self.cache.save_states() if self.keeps_states else None
        longest = max(1, *map(len, tokens))
        # All at once: a move to a larger cache takes nothing along that lies ahead.
        self.make_room(int(self.lengths.max()) + longest)
        if len(tokens) == 1:
            hidden, _, _ = self._read(tokens, self.lengths)
        else:
            # Behind cached rows a batch may run row by row, but never for one position.
            parts = []
            for place in range(longest):
                column = [ids[place : place + 1] or ids[-1:] or [0] for ids in tokens]
                parts.append(self._read(column, self.lengths + place)[0])
            hidden = np.concatenate(parts, axis=1)
        if saved is not None:
            self.cache.restore_states(saved, {row: row for row in range(len(tokens))})
        return hidden

    def _read(
        self, tokens: Sequence[Sequence[int]], starts: Indices
    ) -> tuple[Floats, Floats, Floats]:
        """Run token ids of every row from its start [R] on; returns what `forward` gives."""
        assert not self.keeps_states or (self._stand == self.lengths).all(), "states went on alone"
        counts = np.array([len(ids) for ids in tokens], np.int64)
        # What a shorter row writes behind its own tokens is overwritten before it is ever read.
        padded = np.zeros((len(tokens), max(1, int(counts.max()))), np.int64)
        for row, ids in enumerate(tokens):
            padded[row, : len(ids)] = ids
        embeds = self.engine.embed(padded)
        return self.engine.forward(self.cache, embeds, starts, counts - 1, self.inner)

    def went_on(self, positions: int) -> None:
        """Note that a rollout has run positions behind each row, which no text follows."""
        self._stand = self._stand + positions

    def stand_behind(self, thought_RD: Floats, embeds_RD: Floats, positions: int) -> None:
        """Keep the positions that a rollout has run, for text that follows its last thought."""
        self.lengths = self.lengths + positions
        self.thought, self.next_embeds = thought_RD[:, None], embeds_RD[:, None]

    def select(self, rows: Sequence[int], *, keep: bool) -> SequenceBatch:
        """Return a batch of some of the rows, in ascending order, to write text.

        Inner links do not matter for text, and those of the first agent stand in for all. A batch
        that is to be kept goes on as it is, so its rows are copied. Otherwise it must not be used
        again: where that can be done, its rows move within its cache.
        """
        assert not self.keeps_states or (self._stand == self.lengths).all(), "states went on alone"
        chosen = list(rows)
        positions = int(self.lengths[chosen].max())
        moved = None
        if not keep and isinstance(self.cache, Cache):
            moved = self.cache.narrowed(chosen, positions)
        cache = moved or self.engine.new_cache(len(chosen), self.cache.capacity)
        if moved is None:
            cache.copy_rows(self.cache, chosen, positions)
        return SequenceBatch(
            cache=cache,
            engine=self.engine,
            inner={name: operand[:1] for name, operand in self.inner.items()},
            prefixes=[self.prefixes[row] for row in chosen],
            lengths=self.lengths[chosen],
            thought=self.thought[chosen],
            next_embeds=self.next_embeds[chosen],
            owner=None if moved is None else self,
        )

    def make_room(self, positions: int) -> None:
        """Move to a larger cache if a row needs `positions` and this one has less."""
        if positions <= self.cache.capacity:
            return
        rows = range(self.cache.rows)
        most = max(positions, self.engine.entry.max_positions)
        capacity = cache_capacity(min(positions + DECODE_HEADROOM, most))
        larger = self.engine.new_cache(len(rows), capacity)
        larger.copy_rows(self.cache, rows, int(self.lengths.max()))
        if self.owner is None:
            self._release_cache()
        self.owner = None
        self._hold(larger)

    def _hold(self, cache: KeyValueRows) -> None:
        """Use a cache until this batch is gone, or `_release_cache` is called."""
        self.cache = cache
        self._release_cache = release = weakref.finalize(self, self.engine.release, cache)
        release.atexit = False


def ragged_window(
    embeds: Sequence[Floats], kept: Sequence[int], capacity: int
) -> tuple[Floats, Indices, Indices]:
    """Cut the part of each sequence [T, d] that must run, as one rectangular call.

    Every row writes as many cache rows as the widest one needs. A row that keeps a long prefix and
    adds little would write past the capacity; it starts earlier instead and recomputes the end of
    what it keeps, which gives the same rows again.

    Returns inputs [R, S, d], each row's write index [R], and its last real input within S [R].
    """
    positions = max(len(s) - k for s, k in zip(embeds, kept, strict=True))
    starts = np.array([min(k, capacity - positions) for k in kept], np.int64)
    inputs = np.zeros((len(embeds), positions, embeds[0].shape[1]), np.float32)
    for row, (sequence, start) in enumerate(zip(embeds, starts, strict=True)):
        part = sequence[start : start + positions]
        inputs[row, : len(part)] = part
    last = np.array([len(s) for s in embeds], np.int64) - 1 - starts
    return inputs, starts, last
