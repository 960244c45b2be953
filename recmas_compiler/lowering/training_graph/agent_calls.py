"""What a backbone does in training: read a batch of calls, or think on from it.

Shape legend: N rows, S columns, P shared or constant columns, K key/value heads, M latent
steps, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.compiled import COMPILED_COLUMNS, Compiled
from recmas_compiler.lowering.training_graph.rows import Padded, Row, pad_rows

R = TypeVar("R")

# Keys and values of all layers, one after the other.
Rows = tuple[Tensor, ...]

ConstantRows = dict[tuple[int, int, tuple[tuple[int, ...], ...]], Rows]
"""Cached rows of constant columns, by their first and last column and what rows hold up to it."""

# Batches begin with the system text of an agent; by chance some have a few words more in common.
MOST_SHARED_TEXTS: Final = 32


class AgentCalls:
    """The calls of one frozen backbone.

    What comes before the first message is constant: it runs without gradients, once per step, and
    the rounds share its keys and values. What all rows begin with runs for one row, and not again
    in later steps. Links get the same gradients, because neither the weights nor the inputs of
    these parts depend on them.

    Args:
        backbone: In eval mode, its weights without gradients.
        compile_calls: Run the backbone as compiled graphs.
        checkpoint_calls: Keep a call's inputs only and compute it again for its gradients.
    """

    def __init__(
        self, backbone: TorchBackbone, *, compile_calls: bool, checkpoint_calls: bool
    ) -> None:
        self._backbone = backbone
        self._checkpoint = checkpoint_calls
        self._always_mask = compile_calls
        self._multiple = COMPILED_COLUMNS if compile_calls else 1
        read, extend = _bodies(backbone)
        self._eager_extend = extend
        self._shared_rows = lru_cache(MOST_SHARED_TEXTS)(self._run_shared)
        source = backbone.facts.source
        self._read = Compiled(read, name=f"a call of {source}") if compile_calls else read
        self._extend = Compiled(extend, name=f"a rollout of {source}") if compile_calls else extend

    def read(self, rows: Sequence[Row], constants: ConstantRows) -> Tensor:
        """Return the hidden states [N, S - P, D] of the last columns; rows end together.

        Args:
            rows: The calls.
            constants: Where constant columns are kept.
        """
        padded, kept = self._begin(rows, constants)
        start = padded.num_constant

        def run(embeds_NRD: Tensor) -> Tensor:
            positions_NR = _columns(padded.positions_NS, start)
            return self._read(embeds_NRD, padded.mask_NS, positions_NR, *kept)

        return self._with_gradients(run, _columns(padded.embeds_NSD, start))

    def roll_out(
        self,
        rows: Sequence[Row],
        num_steps: int,
        inner: Callable[[Tensor], Tensor],
        constants: ConstantRows,
    ) -> tuple[Tensor, Tensor]:
        """Return thoughts [N, M, D] and what they become as input embeddings [N, M, D].

        Args:
            rows: The prompts.
            num_steps: M, at least 1.
            inner: Maps hidden states [N, D] to input embeddings [N, D], each row its own way.
            constants: Where constant columns are kept.
        """
        padded, kept = self._begin(rows, constants, more=num_steps - 1)
        start = padded.num_constant

        def run(embeds_NRD: Tensor) -> tuple[Tensor, Tensor]:
            mask_NS, positions_N1 = padded.mask_NS, padded.next_positions
            hidden_NRD, cache = self._extend(
                embeds_NRD,
                mask_NS,
                _columns(padded.positions_NS, start),
                *kept,
            )
            thoughts_ND = [hidden_NRD[:, -1].contiguous()]
            inputs_ND = [inner(thoughts_ND[0])]
            for _ in range(num_steps - 1):
                mask_NS = None if mask_NS is None else pad(mask_NS, (0, 1), value=1)
                hidden_N1D, cache = self._extend(
                    inputs_ND[-1][:, None].to(embeds_NRD.dtype),
                    mask_NS,
                    positions_N1,
                    *cache,
                )
                thoughts_ND.append(hidden_N1D[:, 0])
                inputs_ND.append(inner(hidden_N1D[:, 0]))
                positions_N1 = positions_N1 + 1
            return torch.stack(thoughts_ND, dim=1), torch.stack(inputs_ND, dim=1)

        return self._with_gradients(run, _columns(padded.embeds_NSD, start))

    def _begin(
        self, rows: Sequence[Row], constants: ConstantRows, *, more: int = 0
    ) -> tuple[Padded, Rows]:
        """Pad rows and run their constant columns, unless an earlier round did.

        Args:
            rows: The calls.
            constants: Where constant columns are kept.
            more: Columns that the caller adds behind these.
        """
        window = self._backbone.facts.sliding_window
        padded = pad_rows(
            rows,
            self._embed,
            multiple=self._multiple,
            always_mask=self._always_mask,
            share_up_to=None if window is None else window - more,
        )
        begin, end = len(padded.shared_ids), padded.num_constant
        kept: Rows = ()
        if begin:
            kept = tuple(
                rows_1KPD.expand(len(rows), -1, -1, -1)
                for rows_1KPD in self._shared_rows(padded.shared_ids)
            )
        if begin == end:
            return padded, kept
        key = begin, end, padded.constant_ids
        if key not in constants:
            # Detached, nothing of this call has gradients: the same as a call without messages.
            _, constants[key] = self._extend(
                _columns(padded.embeds_NSD.detach(), begin, end),
                None if padded.mask_NS is None else _columns(padded.mask_NS, 0, end),
                _columns(padded.positions_NS, begin, end),
                *kept,
            )
        return padded, constants[key]

    @torch.no_grad()
    def _run_shared(self, ids: tuple[int, ...]) -> Rows:
        # Eager, because it runs too seldom to be worth compiling for one row.
        embeds_1PD = self._embed(torch.tensor([ids]))
        positions_1P = torch.arange(len(ids), device=embeds_1PD.device)[None]
        return self._eager_extend(embeds_1PD, None, positions_1P)[1]

    def _embed(self, ids: Tensor) -> Tensor:
        return self._backbone.embed(ids.to(next(self._backbone.embedding.parameters()).device))

    def _with_gradients(self, run: Callable[[Tensor], R], embeds_NRD: Tensor) -> R:
        if not self._checkpoint or not torch.is_grad_enabled():
            return run(embeds_NRD)
        result: R = checkpoint(run, embeds_NRD, use_reentrant=False, preserve_rng_state=False)
        return result


def _columns(rows_NS: Tensor, first: int, end: int | None = None) -> Tensor:
    # A copy, because a view would be compiled as a thing of its own.
    return rows_NS[:, first:end].clone()


def _bodies(
    backbone: TorchBackbone,
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Rows]]]:
    """Return the backbone as functions of tensors: hidden states alone, and with cached rows."""
    body = backbone.body

    def extend(
        embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, *kept: Tensor
    ) -> tuple[Tensor, Rows]:
        # A cache without a config keeps every row, in sliding layers too: the mask does the rest.
        cache = DynamicCache(list(zip(kept[::2], kept[1::2], strict=True)))
        out = body(
            inputs_embeds=embeds_NRD,
            attention_mask=mask_NS,
            position_ids=positions_NR,
            past_key_values=cache,
            use_cache=True,
        )
        rows = tuple(rows for layer in cache.layers for rows in (layer.keys, layer.values))
        return out.last_hidden_state, rows

    def read(
        embeds_NRD: Tensor, mask_NS: Tensor | None, positions_NR: Tensor, *kept: Tensor
    ) -> Tensor:
        # Cached rows that nobody reads would get gradients of zeros in compiled code.
        return extend(embeds_NRD, mask_NS, positions_NR, *kept)[0]

    return read, extend
