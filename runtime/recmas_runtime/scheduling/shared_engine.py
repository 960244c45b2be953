"""A backbone whose engines several runs share: calls of runs wait for the scheduler.

Shape legend: R rows, S positions of a call, T positions of a prompt, d width, V vocabulary, G
groups of rows with one inner link each, N rows or vectors of all calls that run together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from recmas_runtime.engines.interface import Floats, Indices, Operands
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.manifest import BackboneEntry
from recmas_runtime.scheduling.kept_prompts import BLOCK, KeptBlock, KeptPrompts, block_keys
from recmas_runtime.scheduling.rows import Row, StepBatch, TaskCache
from recmas_runtime.scheduling.scheduler import (
    ChunkCall,
    HeadCall,
    Scheduler,
    StepCall,
    current_task,
)

# Logits that are there at a time: 64 rows of a vocabulary of 150,000 are 38 MB.
_MOST_LOGITS: Final = 64
_MOST_INNER: Final = 1024


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One position of rows: inputs [R, 1, d], where they are written [R], each row's link.

    Of one row there may be inputs of further positions, [1, S, d]; see `StepCall`.
    """

    rows: Sequence[Row]
    embeds: Floats
    positions: Indices
    inner: Sequence[Operands]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Positions of one row from `start` on: inputs [S, d]."""

    row: Row
    embeds: Floats
    start: int
    inner: Operands


class SharedEngine:
    """See `engines.interface.Backbone`; outside of tasks its calls run at once.

    Args:
        chunk: Positions of a prompt that run in one call.
        kept_bytes: Memory for beginnings of prompts that are kept for other runs.
    """

    def __init__(
        self,
        engine: BackboneEngine,
        link: LinkEngine,
        scheduler: Scheduler,
        *,
        chunk: int,
        kept_bytes: int,
    ) -> None:
        self._engine = engine
        self._link = link
        self._scheduler = scheduler
        self._chunk = chunk
        self._steps = StepBatch(engine)
        # States of a row depend on all before it, and there is one for each position kept.
        self.kept = KeptPrompts(0 if has_states(engine.entry.layers) else kept_bytes)
        self._inner: dict[tuple[int, int], tuple[Operands, Operands]] = {}

    @property
    def entry(self) -> BackboneEntry:
        """The backbone's entry in the manifest."""
        return self._engine.entry

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches that runs use now; what is kept for the next ones does not count."""
        kept = 0 if self._steps.rows or self._steps.cache is None else self._steps.cache.num_bytes
        return self._engine.caches.bytes_in_use - kept

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        return self._engine.embed(input_ids)

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        if current_task() is None or len(hidden) > _MOST_LOGITS:
            return self._engine.logits(hidden)
        logits: Floats = self._scheduler.wait_for(HeadCall(self, len(hidden), hidden))
        return logits

    def new_cache(self, rows: int, capacity: int) -> TaskCache:
        """Return a cache for `rows` sequences of at least `capacity` positions."""
        return TaskCache(self._engine.new_cache(1, capacity) for _ in range(rows))

    def release(self, cache: TaskCache) -> None:
        """Take a cache that its user needs no more; may be called at any time."""
        for row in cache.each:
            row.leave()
            self._engine.release(row.cache)

    def drop_idle(self) -> None:
        """Free what is kept for later."""
        self.kept.clear()
        self._engine.drop_idle()

    def free_memory(self) -> None:
        """Let go of everything that is only kept for later."""
        self._steps.drop()
        self.drop_idle()

    def forward(
        self,
        cache: TaskCache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence through the backbone and extend the cache."""
        rows, positions, _ = inputs_embeds.shape
        if positions == 1 and (write_index > 0).all() and (last_index == 0).all():
            thought, following = self._step(cache, inputs_embeds, write_index, inner)
            return thought, thought, following
        hidden = np.zeros_like(inputs_embeds)
        last = np.zeros((2, rows, 1, inputs_embeds.shape[2]), np.float32)
        for place, end in enumerate((last_index + 1).tolist()):
            if end == 0:
                continue
            hidden[place, :end], last[0, place], last[1, place] = self._prompt(
                cache.each[place],
                inputs_embeds[place, :end],
                int(write_index[place]),
                self._inner_of(inner, place, rows),
            )
        return hidden, last[0], last[1]

    def rollout(
        self,
        cache: TaskCache,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps from a prefill's last position."""
        thoughts, embeds = [thought[:, 0]], [next_embeds[:, 0]]
        for step in range(num_steps - 1):
            thought, next_embeds = self._step(cache, next_embeds, write_index + step, inner)
            thoughts.append(thought[:, 0])
            embeds.append(next_embeds[:, 0])
        return np.stack(thoughts), np.stack(embeds)

    def _step(
        self, cache: TaskCache, embeds: Floats, positions: Indices, inner: Operands
    ) -> tuple[Floats, Floats]:
        rows = cache.rows
        step = _Step(
            rows=cache.each,
            embeds=embeds,
            positions=positions,
            inner=[self._inner_of(inner, place, rows) for place in range(rows)],
        )
        call = StepCall(self, rows, step)
        found: tuple[Floats, Floats]
        if current_task() is None:
            (found,) = self.run_steps([call])
        else:
            found = self._scheduler.wait_for(call)
        return found

    def read_draft(
        self, cache: TaskCache, inputs_embeds: Floats, write_index: Indices, inner: Operands
    ) -> Floats:
        """Run a token of one sequence, and what is drafted behind it if no others step."""
        step = _Step(
            rows=cache.each,
            embeds=inputs_embeds,
            positions=write_index,
            inner=[self._inner_of(inner, 0, 1)],
        )
        call = StepCall(self, 1, step, num_drafted=inputs_embeds.shape[1] - 1)
        if current_task() is None:
            return self.run_draft(call)[0]
        found: tuple[Floats, Floats] = self._scheduler.wait_for(call)
        return found[0]

    def _prompt(
        self, row: Row, embeds: Floats, start: int, inner: Operands
    ) -> tuple[Floats, Floats, Floats]:
        """Run inputs [T, d] of one sequence; returns hidden states [T, d], the last, its link's."""
        keys = list(block_keys(embeds)) if start == 0 else []
        hidden = self._take_kept(row, keys)
        parts = [hidden]
        done = len(hidden)
        while True:
            left = len(embeds) - done
            # A call for the last few alone would read all weights for them.
            count = left if left <= self._chunk * 3 // 2 else self._chunk
            chunk = _Chunk(
                row=row, embeds=embeds[done : done + count], start=start + done, inner=inner
            )
            call = ChunkCall(self, count, chunk)
            if current_task() is None:
                states, thought, following = self.run_chunk(call)
            else:
                states, thought, following = self._scheduler.wait_for(call)
            parts.append(states[0])
            done += count
            if done == len(embeds):
                break
        hidden = np.concatenate(parts)
        self._keep(row, keys, hidden)
        return hidden, thought[0], following[0]

    def _take_kept(self, row: Row, keys: Sequence[bytes]) -> Floats:
        """Begin a sequence with what is kept; returns the hidden states of these positions."""
        blocks = self.kept.beginning(keys)
        if not blocks:
            return np.zeros((0, self.entry.width), np.float32)
        cache = row.by_itself()
        cache.begin([0])
        cache.write_rows(
            [
                np.concatenate(arrays, axis=2)
                for arrays in zip(*(b.rows for b in blocks), strict=True)
            ]
        )
        count = len(blocks) * BLOCK
        self._scheduler.counts.kept_positions += count
        if (task := current_task()) is not None:
            task.cached_positions += count
        return np.concatenate([block.hidden for block in blocks])

    def _keep(self, row: Row, keys: Sequence[bytes], hidden: Floats) -> None:
        """Keep a prompt's blocks that are not kept yet."""
        known = len(self.kept.beginning(keys))
        if known == len(keys) or not self.kept.takes_any:
            return
        arrays = row.by_itself().read_rows([0], len(keys) * BLOCK)
        for place in range(known, len(keys)):
            span = slice(place * BLOCK, (place + 1) * BLOCK)
            rows = [np.ascontiguousarray(array[:, :, span]) for array in arrays]
            self.kept.keep(keys[place], KeptBlock(rows=rows, hidden=hidden[span].copy()))

    def _inner_of(self, inner: Operands, row: int, rows: int) -> Operands:
        """Return the operands of one row's link; the same object each time."""
        groups = len(inner["w1"])
        if groups == 1:
            return inner
        key = id(inner), row // (rows // groups)
        if key not in self._inner:
            if len(self._inner) >= _MOST_INNER:
                self._inner.clear()
            part = {name: operand[key[1] : key[1] + 1] for name, operand in inner.items()}
            # With what it is of, so that no other object gets that identity.
            self._inner[key] = inner, part
        return self._inner[key][1]

    def run_steps(self, calls: Sequence[StepCall]) -> list[tuple[Floats, Floats]]:
        """Run one position of all rows of all calls, in one engine call."""
        works: list[_Step] = [call.work for call in calls]
        rows = [row for work in works for row in work.rows]
        inner = [each for work in works for each in work.inner]
        embeds = np.concatenate([work.embeds[:, :1] for work in works])
        positions = np.concatenate([work.positions for work in works])
        thought, following = self._steps.run(rows, embeds, positions, inner[0])
        links = {id(each): each for each in inner}
        if len(links) > 1:
            following = self._through_links(thought, inner, links.values())
        bounds = list(itertools.accumulate((len(work.rows) for work in works), initial=0))
        return [
            (thought[first:last], following[first:last])
            for first, last in itertools.pairwise(bounds)
        ]

    def _through_links(
        self, thought: Floats, inner: Sequence[Operands], links: Iterable[Operands]
    ) -> Floats:
        """Map thoughts [N, 1, d] through the inner link of each row."""
        following = np.empty_like(thought)
        for link in links:
            own = [place for place, each in enumerate(inner) if each is link]
            following[own, 0] = self._link.apply(np.ascontiguousarray(thought[own, 0][None]), link)[
                0
            ]
        return following

    def run_draft(self, call: StepCall) -> tuple[Floats, Floats]:
        """Run the position of a call's one row, and those that are drafted behind it."""
        work: _Step = call.work
        hidden, _, following = self._engine.forward(
            work.rows[0].by_itself(),
            work.embeds,
            work.positions,
            np.array([work.embeds.shape[1] - 1], np.int64),
            work.inner[0],
        )
        return hidden, following

    def run_chunk(self, call: ChunkCall) -> tuple[Floats, Floats, Floats]:
        """Run a part of a prompt."""
        work: _Chunk = call.work
        return self._engine.forward(
            work.row.by_itself(),
            np.ascontiguousarray(work.embeds[None]),
            np.array([work.start], np.int64),
            np.array([len(work.embeds) - 1], np.int64),
            work.inner,
        )

    def run_heads(self, calls: Sequence[HeadCall]) -> list[Floats]:
        """Compute the logits of all calls, as few calls as memory allows."""
        works: list[Any] = [call.work for call in calls]
        together = np.ascontiguousarray(np.concatenate(works))
        parts = [
            self._engine.logits(together[first : first + _MOST_LOGITS])
            for first in range(0, len(together), _MOST_LOGITS)
        ]
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        bounds = list(itertools.accumulate(map(len, works), initial=0))
        return [logits[first:last] for first, last in itertools.pairwise(bounds)]
