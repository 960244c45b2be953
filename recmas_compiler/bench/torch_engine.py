"""A backbone as fast as torch runs it: static caches, compiled steps, rollouts as one CUDA graph.

What the engines of a bundle are measured against. It has the methods of the runtime's
`BackboneEngine`, so the runtime's executor follows the same plan over either.

Shape legend: R rows (agents of a batch times samples), S positions of a call, C cache rows per
sample, M latent steps, d model width, V vocabulary, G groups of rows with one link each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from recmas_compiler.backbones.loaded.cache_argument import cache_argument
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.static_cache import static_cache, use_static_attention
from recmas_compiler.lowering.training_graph.packed_products import multiply_packed, packed_weight
from recmas_runtime.engines.interface import (
    Floats,
    HandedRows,
    Indices,
    Operands,
    keeps_rows_only,
    sees_all_rows,
)
from recmas_runtime.formats.layers import cache_tensors
from recmas_runtime.formats.link_kinds import NORM_EPSILON


# Weights in the layout of oneDNN's kernels, packed once for all shapes. `torch.compile` packs them
# too when told to freeze a model, but anew for every shape, with a copy of all weights each time;
# as one operator of its own a packed product fits into any graph. On an AMD EPYC with AVX-512 it
# takes 0.4 of the time of a plain product of 8 or 1024 rows; for one row both read the weights at
# the speed of the memory.
@torch.library.custom_op("recmas::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply [..., in] with a packed weight; returns [..., out]."""
    return multiply_packed(x, packed, bias)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


class PackedLinear(nn.Module):
    """A linear layer without gradients; it does not keep the weight of the original."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = packed_weight(linear.weight.detach())
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y: Tensor = packed_linear(x, self._packed, self._bias)
        return y


def pack_linear_layers(model: nn.Module) -> None:
    """Replace every linear layer of a model, where this build of torch has oneDNN."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


Inner = Mapping[str, Tensor]


class TorchTables:
    """A backbone in torch, moved to device and dtype, without the way it runs its layers."""

    def __init__(
        self, backbone: TorchBackbone, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.entry = backbone.facts
        self.device = torch.device(device)
        self.dtype = dtype
        self._backbone = backbone
        self._cache_argument = cache_argument(backbone.body)
        self._bound: tuple[Operands, Inner] = ({}, {})
        backbone.model.to(device=self.device, dtype=dtype)

    @torch.no_grad()
    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        return to_numpy(self._backbone.embed(torch.from_numpy(input_ids).to(self.device)))

    @torch.no_grad()
    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        return to_numpy(self._backbone.logits(self.tensor(hidden)))

    def tensor(self, array: Floats) -> Tensor:
        """Return an array on the device, in the engine's element type."""
        return torch.from_numpy(array).to(device=self.device, dtype=self.dtype)

    def bind(self, operands: Operands) -> Inner:
        """Return inner links on the device, the same tensors while the links stay the same."""
        if self._bound[0] is not operands:
            tensors = {
                name: torch.from_numpy(array).to(
                    device=self.device, dtype=torch.bool if array.dtype == np.bool_ else self.dtype
                )
                for name, array in operands.items()
            }
            self._bound = operands, tensors
        return self._bound[1]


def apply_inner(hidden_R1d: Tensor, links: Inner) -> Tensor:
    """Return the inner links' outputs [R, 1, d], in the runtime's unified form of a link.

    Operands have a leading axis G, as `recmas_runtime.formats.links` describes them.
    """
    width = hidden_R1d.shape[-1]
    x = hidden_R1d.reshape(links["w1"].shape[0], -1, width)
    centred = x - x.mean(dim=-1, keepdim=True)
    normed = torch.where(links["pre_norm"], _norm(centred, "pre", links), x)
    y = torch.bmm(gelu(torch.bmm(normed, links["w1"]) + links["b1"]), links["w2"])
    y = y + torch.bmm(x, links["w3"]) + links["bias"]
    y = torch.where(links["post_norm"], _norm(y, "post", links), y)
    return y.reshape(hidden_R1d.shape)


def _norm(x: Tensor, name: str, links: Inner) -> Tensor:
    normed = rms_norm(x, x.shape[-1:], eps=NORM_EPSILON)
    return normed * links[f"{name}_scale"] + links[f"{name}_bias"]


def to_numpy(tensor: Tensor) -> Floats:
    """Return a tensor on the host in float32."""
    array: Floats = tensor.to("cpu", torch.float32).numpy()
    return array


# Steps are compiled anew for every batch and capacity: fixed shapes are what they gain from.
MOST_STEP_SHAPES: Final = 64

_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    # What lies between the products is too little to be worth a second thread: waking it costs
    # more. Packed weights are opaque, their strides cannot be asserted.
    "cpu": {"cpp.min_chunk_size": 2**16, "size_asserts": False},
    "cuda": {},
}


@dataclass(kw_only=True, eq=False)
class TorchCache:
    """Key/value rows of R sequences, and the rollouts that were captured over them, by steps.

    Keys and values are one [R, K, C, D] per layer, K key/value heads of width D. Each sequence goes
    on at the row that the write index [R] says.
    """

    rows: int
    capacity: int
    keys: list[Tensor]
    values: list[Tensor]
    write_index: Tensor
    rollouts: dict[int, _CapturedRollout] = field(default_factory=dict)

    def copy_rows(self, source: TorchCache, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order."""
        chosen = list(rows)
        for mine, other in zip(self._layers(), source._layers(), strict=True):
            mine[:, :, :positions] = other[chosen, :, :positions]

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies [n, K, positions, D] on the host: keys, values of each layer in turn."""
        chosen = list(rows)
        return [to_numpy(layer[chosen, :, :positions]) for layer in self._layers()]

    def hide_rows(self, row: int, handed: Sequence[HandedRows]) -> None:
        """Refuse rows that not every layer sees."""
        if any(rows.seen_by is not None for rows in handed):
            raise sees_all_rows("torch's engine")

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all sequences with [R, K, positions, D], as layers come."""
        for mine, array in zip(self._layers(), values, strict=True):
            mine[:, :, : array.shape[2]] = torch.from_numpy(array)

    def save_states(self) -> Any:
        """Refuse: there are none."""
        raise keeps_rows_only("torch's engine")

    def restore_states(self, saved: Any, rows: Mapping[int, int]) -> None:
        """Refuse: there are none."""
        raise keeps_rows_only("torch's engine")

    def _layers(self) -> Iterator[Tensor]:
        for pair in zip(self.keys, self.values, strict=True):
            yield from pair


class TorchEngine(TorchTables):
    """One backbone in torch, its inner link fused into the step.

    On CUDA all steps of a rollout are one CUDA graph (untried on hardware). Nobody else may use the
    backbone: its model moves to `device` and `dtype`, and attends over static caches from now on.
    A step that is not compiled runs eagerly, which starts at once.
    """

    def __init__(
        self,
        backbone: TorchBackbone,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
    ) -> None:
        super().__init__(backbone, device=device, dtype=dtype)
        use_static_attention(backbone.model)
        if self.device.type == "cpu":
            pack_linear_layers(backbone.model)
        self._step: Callable[..., tuple[Tensor, Tensor]] = self._run_step
        if compiled:
            # Torch's own annotations do not know the limit.
            self._step = torch.compile(  # type: ignore[call-overload]
                self._run_step,
                fullgraph=True,
                dynamic=False,
                recompile_limit=MOST_STEP_SHAPES,
                options=dict(_OPTIONS[self.device.type]),
            )
        self._idle: list[TorchCache] = []

    def new_cache(self, rows: int, capacity: int) -> TorchCache:
        """Return a cache for `rows` sequences of at most `capacity` positions.

        One that was given back is used again, with what was captured over it.
        """
        for cache in self._idle:
            if (cache.rows, cache.capacity) == (rows, capacity):
                self._idle.remove(cache)
                return cache
        keys, values = (
            [
                torch.zeros(t.whole(rows, capacity), dtype=self.dtype, device=self.device)
                for t in cache_tensors(self.entry.layers)
                if t.name.startswith(kind)
            ]
            for kind in ("key.", "value.")
        )
        index = torch.zeros(rows, dtype=torch.long, device=self.device)
        return TorchCache(rows=rows, capacity=capacity, keys=keys, values=values, write_index=index)

    def release(self, cache: TorchCache) -> None:
        """Keep a cache that its user needs no more for the next one."""
        self._idle.append(cache)

    def drop_idle(self) -> None:
        """Free the caches that are kept for later."""
        self._idle.clear()

    @torch.no_grad()
    def forward(
        self,
        cache: TorchCache,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence from `write_index` on; extends the cache.

        Returns hidden states [R, S, d], the one at `last_index` [R, 1, d], and its inner link's
        output [R, 1, d].
        """
        links, embeds_RSd = self.bind(inner), self.tensor(inputs_embeds)
        cache.write_index.copy_(torch.from_numpy(write_index))
        if embeds_RSd.shape[1] == 1:
            last_R1d, next_R1d = self._step(embeds_RSd, *_state(cache), links)
            hidden_RSd = last_R1d
        else:
            hidden_RSd = self._run_body(embeds_RSd, *_state(cache))
            last_R = torch.from_numpy(last_index).to(self.device)
            row_R = torch.arange(cache.rows, device=self.device)
            last_R1d = hidden_RSd[row_R, last_R][:, None]
            next_R1d = apply_inner(last_R1d, links)
        return to_numpy(hidden_RSd), to_numpy(last_R1d), to_numpy(next_R1d)

    @torch.no_grad()
    def rollout(
        self,
        cache: TorchCache,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps from `write_index` on, the position after the prompt.

        Returns hidden states and their inner links' outputs, both [M, R, d]; the first ones are
        `thought` and `next_embeds`, [R, 1, d].
        """
        links, first_R1d = self.bind(inner), self.tensor(next_embeds)
        cache.write_index.copy_(torch.from_numpy(write_index))
        if self.device.type == "cuda" and num_steps > 1:
            captured = cache.rollouts.get(num_steps)
            if captured is None or captured.links is not links:
                captured = _CapturedRollout(self._roll, cache, links, num_steps)
                cache.rollouts[num_steps] = captured
            hidden, embeds = captured(first_R1d)
        else:
            hidden, embeds = self._roll(first_R1d, cache, links, num_steps)
        return (
            np.concatenate([thought[None, :, 0], to_numpy(hidden[:, :, 0])]),
            np.concatenate([next_embeds[None, :, 0], to_numpy(embeds[:, :, 0])]),
        )

    def _roll(
        self, embeds_R1d: Tensor, cache: TorchCache, links: Inner, num_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Run the steps after the first; hidden states and embeddings, both [M - 1, R, 1, d]."""
        shape = (num_steps - 1, *embeds_R1d.shape)
        hidden, embeds = embeds_R1d.new_empty(shape), embeds_R1d.new_empty(shape)
        for step in range(num_steps - 1):
            last_R1d, embeds_R1d = self._step(embeds_R1d, *_state(cache), links)
            hidden[step], embeds[step] = last_R1d, embeds_R1d
            # On the device, so that a captured graph moves on too.
            cache.write_index.add_(1)
        return hidden, embeds

    def _run_step(
        self,
        embeds_R1d: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        write_index: Tensor,
        links: Inner,
    ) -> tuple[Tensor, Tensor]:
        """Run one position; its hidden state and its inner link's output, both [R, 1, d]."""
        hidden_R1d = self._run_body(embeds_R1d, keys, values, write_index)
        return hidden_R1d, apply_inner(hidden_R1d, links)

    def _run_body(
        self,
        embeds_RSd: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        write_index: Tensor,
    ) -> Tensor:
        offset_S = torch.arange(embeds_RSd.shape[1], device=self.device)
        hidden_RSd: Tensor = self._backbone.body(
            inputs_embeds=embeds_RSd,
            position_ids=write_index[:, None] + offset_S,
            use_cache=True,
            **{self._cache_argument: static_cache(keys, values, write_index)},
        ).last_hidden_state
        return hidden_RSd


class _CapturedRollout:
    """All steps of a rollout as one CUDA graph: one launch, whatever the number of steps.

    Everything that `roll` touches keeps its address.
    """

    def __init__(
        self,
        roll: Callable[[Tensor, TorchCache, Inner, int], tuple[Tensor, Tensor]],
        cache: TorchCache,
        links: Inner,
        num_steps: int,
    ) -> None:
        self.links = links
        rows = len(cache.write_index)
        weight = links["w1"]
        self._embeds_R1d = torch.zeros(
            (rows, 1, weight.shape[1]), dtype=weight.dtype, device=weight.device
        )
        start = cache.write_index.clone()
        # Compiling, and what libraries allocate on first use, must not happen while capturing.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            roll(self._embeds_R1d, cache, links, 2)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = roll(self._embeds_R1d, cache, links, num_steps)
        # Warming up wrote at and moved the write index; the rows are overwritten by the replay.
        cache.write_index.copy_(start)

    def __call__(self, embeds_R1d: Tensor) -> tuple[Tensor, Tensor]:
        """Run from these embeddings; results are valid until the next call."""
        self._embeds_R1d.copy_(embeds_R1d)
        self._graph.replay()
        return self._out


def _state(cache: TorchCache) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return cache.keys, cache.values, cache.write_index
