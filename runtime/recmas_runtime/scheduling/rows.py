"""Sequences of runs that share a backbone: each by itself, or in a place beside others.

A sequence has a cache of its own. While it takes steps of one position beside others it has a
place in a common cache, because a call needs its rows one behind the other in memory; what the
steps write there is brought back when anything else is asked of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.interface import Floats, HandedRows, Indices, Operands
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.caches import Cache
from recmas_runtime.formats.plan import cache_capacity


@dataclass(eq=False)
class Row:
    """One sequence.

    Attributes:
        cache: Its own, of one row.
        steps: Where it steps beside others; None while it is by itself.
        place: Its place there.
        start: The positions `start` to `stop` were written there and not in its own cache.
    """

    cache: Cache
    steps: StepBatch | None = None
    place: int = 0
    start: int = 0
    stop: int = 0

    def by_itself(self) -> Cache:
        """Return its own cache, up to date; it then has no place beside others."""
        if self.steps is not None:
            assert self.steps.cache is not None, "its rows are there"
            self.cache.take(0, self.steps.cache, self.place, self.start, self.stop)
            self.leave()
        return self.cache

    def leave(self) -> None:
        """Give up its place and what was written there."""
        if self.steps is not None:
            self.steps.rows.pop(self.place)
            self.steps = None


class StepBatch:
    """The common cache of the sequences of one backbone that step together.

    Attributes:
        rows: By place, the sequences that have one.
    """

    def __init__(self, engine: BackboneEngine) -> None:
        self._engine = engine
        self.cache: Cache | None = None
        self.rows: dict[int, Row] = {}

    def run(
        self, rows: Sequence[Row], embeds: Floats, positions: Indices, inner: Operands
    ) -> tuple[Floats, Floats]:
        """Run one position of each sequence.

        Args:
            rows: N of them.
            embeds: [N, 1, d].
            positions: [N], where each is written.
            inner: Of one group: the inner link of all rows.

        Returns thoughts and the inner link's outputs, [N, 1, d].
        """
        chosen = set(map(id, rows))
        for row in [row for row in self.rows.values() if id(row) not in chosen]:
            row.by_itself()
        if len(rows) == 1 and rows[0].steps is None:
            _, thought, following = self._engine.forward(
                rows[0].cache, embeds, positions, np.zeros(1, np.int64), inner
            )
            return thought, following
        cache = self._room(rows, int(positions.max()) + 1)
        self._give_places(cache, rows, positions)
        view = cache.leading(len(rows))
        order = np.array([row.place for row in rows])
        by_place = np.empty_like(order)
        by_place[order] = np.arange(len(rows))
        _, thought, following = self._engine.forward(
            view,
            np.ascontiguousarray(embeds[by_place]),
            positions[by_place],
            np.zeros(len(rows), np.int64),
            inner,
        )
        cache.follow(view)
        for row, position in zip(rows, positions.tolist(), strict=True):
            row.stop = position + 1
        return thought[order], following[order]

    def _room(self, rows: Sequence[Row], positions: int) -> Cache:
        """Return the common cache, with room for rows and positions."""
        if self.cache is not None:
            if self.cache.rows >= len(rows) and self.cache.capacity >= positions:
                return self.cache
            for row in list(self.rows.values()):
                row.by_itself()
            positions = max(positions, self.cache.capacity)
            num_rows = max(len(rows), self.cache.rows)
            self._engine.caches.discard(self.cache)
            self.cache = None
        else:
            num_rows = len(rows)
        # Twice what is needed, so that it rarely moves; memory that is not used is not taken.
        capacity = max(positions, *(row.cache.capacity for row in rows))
        self.cache = self._engine.new_cache(
            1 << (num_rows - 1).bit_length(), cache_capacity(capacity)
        )
        return self.cache

    def _give_places(self, cache: Cache, rows: Sequence[Row], positions: Indices) -> None:
        """Let the sequences have the first places of the common cache."""
        free = [place for place in range(len(rows)) if place not in self.rows]
        for row, position in zip(rows, positions.tolist(), strict=True):
            if row.steps is self and row.place < len(rows):
                continue
            place = free.pop()
            if row.steps is self:
                cache.take(place, cache, row.place, 0, position)
                del self.rows[row.place]
            else:
                cache.take(place, row.cache, 0, 0, position)
                row.start = row.stop = position
            row.steps, row.place = self, place
            self.rows[place] = row

    def drop(self) -> None:
        """Free the common cache."""
        for row in list(self.rows.values()):
            row.by_itself()
        self.cache = None


class TaskCache:
    """What a run takes for a cache of R sequences, see `KeyValueRows`: R rows."""

    def __init__(self, caches: Iterable[Cache]) -> None:
        self.each = [Row(cache) for cache in caches]

    @property
    def rows(self) -> int:
        """Sequences, R."""
        return len(self.each)

    @property
    def capacity(self) -> int:
        """Positions per sequence."""
        return self.each[0].cache.capacity

    @property
    def num_bytes(self) -> int:
        """Bytes of its own caches."""
        return sum(row.cache.num_bytes for row in self.each)

    def copy_rows(self, source: Any, rows: Sequence[int], positions: int) -> None:
        """Take the first positions of some sequences of another cache."""
        for own, row in zip(self.each, rows, strict=True):
            own.by_itself().take(0, source.each[row].by_itself(), 0, 0, positions)

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies on the host."""
        each = [self.each[row].by_itself().read_rows([0], positions) for row in rows]
        return [np.concatenate(arrays) for arrays in zip(*each, strict=True)]

    def hide_rows(self, row: int, handed: Sequence[HandedRows]) -> None:
        """Hide rows of a sequence from layers."""
        self.each[row].by_itself().hide_rows(0, handed)

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all sequences."""
        for place, row in enumerate(self.each):
            row.by_itself().write_rows([array[place : place + 1] for array in values])

    def save_states(self) -> list[Any]:
        """Return a copy of the layer states of all sequences."""
        return [row.by_itself().save_states() for row in self.each]

    def restore_states(self, saved: Any, rows: Mapping[int, int]) -> None:
        """Overwrite the layer states of some sequences."""
        for place, row in rows.items():
            self.each[place].by_itself().restore_states(saved[row], {0: 0})
