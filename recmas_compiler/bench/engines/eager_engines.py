"""A backbone as transformers runs it, eagerly: with its growing cache, or without any.

Both have the methods of the runtime's `BackboneEngine` and serve as measures beside it. Rows of a
batch are of one length: neither pads.

Shape legend: R rows, S positions of a call, T positions so far, M latent steps, d model width.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from recmas_compiler.bench.engines.torch_tables import (
    Floats,
    Indices,
    Operands,
    TorchTables,
    apply_inner,
    to_numpy,
)


@dataclass(kw_only=True)
class GrowingCache:
    """What was computed so far of R sequences.

    Attributes:
        rows: Sequences, R.
        embeds: [R, T, d], every input; None before the first.
        past: Keys and values of them; None where nothing is cached.
    """

    rows: int
    embeds: Tensor | None = None
    past: DynamicCache | None = None


class EagerEngine(TorchTables):
    """A backbone that runs its layers as transformers has them."""

    def new_cache(self, rows: int, capacity: int) -> GrowingCache:
        """Return an empty cache; it grows, whatever the capacity."""
        return GrowingCache(rows=rows)

    def give_back(self, cache: GrowingCache) -> None:
        """Forget a cache."""

    @torch.no_grad()
    def forward(
        self,
        cache: GrowingCache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions behind the first `write_index`; as the runtime's engines do."""
        self._keep(cache, int(write_index[0]))
        hidden_RSd = self._extend(cache, self.tensor(inputs_embeds))
        thought_R1d = hidden_RSd[:, -1:]
        following_R1d = apply_inner(thought_R1d, self.bind(inner))
        return to_numpy(hidden_RSd), to_numpy(thought_R1d), to_numpy(following_R1d)

    @torch.no_grad()
    def rollout(
        self,
        cache: GrowingCache,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps behind the first `write_index`; both results are [M, R, d]."""
        self._keep(cache, int(write_index[0]))
        links = self.bind(inner)
        thoughts, embeds = [self.tensor(thought)], [self.tensor(next_embeds)]
        for _ in range(num_steps - 1):
            thoughts.append(self._extend(cache, embeds[-1])[:, -1:])
            embeds.append(apply_inner(thoughts[-1], links))
        return tuple(np.stack([to_numpy(x[:, 0]) for x in found]) for found in (thoughts, embeds))  # type: ignore[return-value]

    def _keep(self, cache: GrowingCache, positions: int) -> None:
        """Forget everything behind the first positions."""
        if cache.embeds is None:
            return
        cache.embeds = cache.embeds[:, :positions]
        if cache.past is not None:
            surplus = cache.past.get_seq_length() - positions
            if surplus > 0:
                cache.past.crop(-surplus)

    def _extend(self, cache: GrowingCache, embeds_RSd: Tensor) -> Tensor:
        """Run positions behind those of the cache; returns hidden states [R, S, d]."""
        earlier = [] if cache.embeds is None else [cache.embeds]
        cache.embeds = torch.cat([*earlier, embeds_RSd], dim=1)
        return self._run(cache, embeds_RSd)

    @abstractmethod
    def _run(self, cache: GrowingCache, embeds_RSd: Tensor) -> Tensor:
        """Run the last positions of a cache, which holds their inputs already."""


class CachedEngine(EagerEngine):
    """Hugging Face with its own growing cache."""

    def _run(self, cache: GrowingCache, embeds_RSd: Tensor) -> Tensor:
        if cache.past is None:
            cache.past = DynamicCache()
        out = self._backbone.body(
            inputs_embeds=embeds_RSd, past_key_values=cache.past, use_cache=True
        )
        hidden_RSd: Tensor = out.last_hidden_state
        return hidden_RSd


class RecomputingEngine(EagerEngine):
    """The naive form: every step computes the whole sequence."""

    def _run(self, cache: GrowingCache, embeds_RSd: Tensor) -> Tensor:
        out = self._backbone.body(inputs_embeds=cache.embeds, use_cache=False)
        hidden_RSd: Tensor = out.last_hidden_state[:, -embeds_RSd.shape[1] :]
        return hidden_RSd
