"""A bundle's backbones in torch: as fast as torch runs them, or as transformers does.

Shape legend: R rows, S positions of a call, M latent steps, d model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.torch_engine import TorchEngine, TorchTables, apply_inner, to_numpy
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.links.trained import without_link_files
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.progress import Silent
from recmas_runtime.engines.interface import Floats, Indices, Operands
from recmas_runtime.formats.bundle import inside
from recmas_runtime.formats.manifest import SPEC_NAME
from recmas_runtime.formats.precisions import Dtype

# What each device computes in fastest without a change of the weights' meaning.
DTYPES: Final[dict[str, Dtype]] = {"cpu": "float32", "cuda": "bfloat16"}


@dataclass(kw_only=True)
class GrowingCache:
    """Sequences of one length: their inputs [R, T, d], or keys and values where they are kept."""

    embeds: Tensor | None = None
    past: DynamicCache = field(default_factory=DynamicCache)


class TransformersEngine(TorchTables):
    """A backbone as transformers runs it, eagerly: a reference beside the runtime's engines.

    It has the methods of the runtime's `BackboneEngine`. Rows of a batch are of one length: it does
    not pad. With `recompute` no keys and values are kept: every call computes the whole sequence.
    """

    def __init__(
        self,
        backbone: TorchBackbone,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ) -> None:
        super().__init__(backbone, device=device, dtype=dtype)
        self._recompute = recompute

    def new_cache(self, rows: int, capacity: int) -> GrowingCache:
        """Return an empty cache; it grows, whatever the capacity."""
        return GrowingCache()

    def release(self, cache: GrowingCache) -> None:
        """Do nothing: a cache is not used again."""

    def drop_idle(self) -> None:
        """Do nothing: nothing is kept."""

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
        hidden_RSd = self._run(cache, int(write_index[0]), self.tensor(inputs_embeds))
        last_R1d = hidden_RSd[:, -1:]
        next_R1d = apply_inner(last_R1d, self.bind(inner))
        return to_numpy(hidden_RSd), to_numpy(last_R1d), to_numpy(next_R1d)

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
        links, start = self.bind(inner), int(write_index[0])
        hidden, embeds = [self.tensor(thought)], [self.tensor(next_embeds)]
        for step in range(num_steps - 1):
            hidden.append(self._run(cache, start + step, embeds[-1]))
            embeds.append(apply_inner(hidden[-1], links))
        return to_numpy(torch.stack(hidden)[:, :, 0]), to_numpy(torch.stack(embeds)[:, :, 0])

    def _run(self, cache: GrowingCache, start: int, embeds_RSd: Tensor) -> Tensor:
        """Run positions behind the first `start`; returns hidden states [R, S, d]."""
        if self._recompute:
            earlier = [] if cache.embeds is None else [cache.embeds[:, :start]]
            cache.embeds = torch.cat([*earlier, embeds_RSd], dim=1)
            out = self._backbone.body(inputs_embeds=cache.embeds, use_cache=False)
        else:
            surplus = cache.past.get_seq_length() - start
            if surplus > 0:
                cache.past.crop(-surplus)
            body = self._backbone.body
            out = body(inputs_embeds=embeds_RSd, **with_cache(body, cache.past))
        hidden_RSd: Tensor = out.last_hidden_state[:, -embeds_RSd.shape[1] :]
        return hidden_RSd


KINDS: Final[dict[str, Callable[..., TorchTables]]] = {
    "torch": TorchEngine,
    "huggingface": TransformersEngine,
    "naive": partial(TransformersEngine, recompute=True),
}


def open_torch_engine(
    root: Path, backbone: str, *, kind: str, device: str, threads: int
) -> tuple[TorchTables, Dtype, int]:
    """Return one of `KINDS`, its element type, and the bytes of weights that a step of it reads."""
    torch.set_num_threads(threads)
    loaded = load_bundle_backbones(root)[backbone]
    dtype = DTYPES[device]
    # Counted before packing, which changes their form but not their size.
    table = loaded.embedding.weight
    elements = sum(p.numel() for p in loaded.body.parameters() if p is not table)
    engine = KINDS[kind](loaded, device=device, dtype=getattr(torch, dtype))
    return engine, dtype, elements * getattr(torch, dtype).itemsize


def load_bundle_backbones(root: Path) -> dict[str, TorchBackbone]:
    """Load the backbones that a bundle was built from, by their names in its manifest."""
    # Links are the bundle's own; the files they once came from may be gone.
    spec = without_link_files(load_spec(inside(root, SPEC_NAME)), lambda *_: "projected")
    return load_backbones(run_pipeline(build_topology(spec)), progress=Silent())
