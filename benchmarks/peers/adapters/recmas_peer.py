"""A bundle of recmas: the backbone of its answer agent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from peer_worker import About, Logits, PeerModel, seconds

import recmas_runtime as rt
from recmas_runtime.formats.plan import cache_capacity

# Steps behind a filled cache.
MOST_STEPS = 64
# Logits of so many positions are in memory at once.
AT_ONCE = 128


class Model(PeerModel):
    """A loaded system, of which one backbone is asked without its scheduler."""

    def __init__(self, *, bundle: str, threads: int) -> None:
        system = rt.load(bundle, threads=threads)
        agent = system.plan.agents[system.plan.answer_agent]
        engines = system.loaded.engines
        self._system = system  # keeps its sessions
        self._engine: Any = engines.backbones[agent.backbone]
        self._inner = engines.stacked([agent.inner])
        self._cache: Any = None
        entry = self._engine.entry
        self._some_states = np.random.default_rng(0).standard_normal((64, entry.width), np.float32)
        self.about = About(
            version=f"recmas {rt.__version__}",
            vocabulary=entry.vocab_size,
            step_bytes=sum(operand.nbytes for operand in self._inner.values()),
            head_in_prompt=False,
            settings={"decoder": entry.decoder, "precision": entry.precision},
        )

    def prompt(self, ids: Sequence[int]) -> None:
        cache = self._engine.new_cache(1, cache_capacity(len(ids)))
        self._forward(cache, np.array([ids], np.int64))
        self._engine.release(cache)

    def fill(self, rows: int, ids: Sequence[int]) -> None:
        self._cache = self._engine.new_cache(rows, cache_capacity(len(ids) + MOST_STEPS))
        self._used = np.full(rows, len(ids), np.int64)
        _, self._thought, self._following = self._forward(
            self._cache, np.tile(np.array(ids, np.int64), (rows, 1))
        )

    def rewind(self) -> None:
        pass  # a rollout is told where it begins

    def step(self, count: int) -> None:
        # The first state is the prompt's own: one call less than there are states.
        self._engine.rollout(
            self._cache, self._thought, self._following, self._used, self._inner, count + 1
        )

    def drop(self) -> None:
        self._engine.release(self._cache)
        self._engine.drop_idle()
        self._cache = None

    def write(self, ids: Sequence[int], count: int) -> float:
        cache = self._engine.new_cache(1, cache_capacity(len(ids) + count))
        prompt = np.array([ids], np.int64)
        _, state, _ = self._forward(cache, prompt)

        def tokens() -> None:
            hidden, zero = state[:, 0], np.zeros(1, np.int64)
            for position in range(len(ids), len(ids) + count):
                token = self._engine.logits(np.ascontiguousarray(hidden)).argmax(-1)
                hidden = self._engine.forward(
                    cache, self._engine.embed(token[:, None]), zero + position, zero, self._inner
                )[1][:, 0]

        taken: float = seconds(tokens) / count
        self._engine.release(cache)
        return taken

    def logits(self, ids: Sequence[int]) -> Logits:
        cache = self._engine.new_cache(1, cache_capacity(len(ids)))
        states, *_ = self._forward(cache, np.array([ids], np.int64))
        self._engine.release(cache)
        parts = range(0, len(ids), AT_ONCE)
        states_SD = np.ascontiguousarray(states[0])
        return np.concatenate([self._engine.logits(states_SD[i : i + AT_ONCE]) for i in parts])

    def step_logits(self, ids: Sequence[int]) -> Logits:
        if self._engine.entry.precision == "float32":
            raise NotImplementedError
        cache = self._engine.new_cache(1, cache_capacity(len(ids)))
        zero, found = np.zeros(1, np.int64), []
        for position, token in enumerate(ids):
            embeds = self._engine.embed(np.array([[token]], np.int64))
            hidden, *_ = self._engine.forward(cache, embeds, zero + position, zero, self._inner)
            found.append(self._engine.logits(np.ascontiguousarray(hidden[:, 0])))
        self._engine.release(cache)
        return np.concatenate(found)

    def head(self, rows: int) -> None:
        self._engine.logits(self._some_states[:rows])

    def _forward(self, cache: Any, ids_RS: Any) -> Any:
        rows, positions = ids_RS.shape
        start, last = np.zeros(rows, np.int64), np.full(rows, positions - 1, np.int64)
        return self._engine.forward(cache, self._engine.embed(ids_RS), start, last, self._inner)
