"""Rows of caches in torch: cut out, moved, handed over, and gone on behind, one sequence at a time.

Shape legend: T positions, P rows, H key/value heads, D width of the agent or of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import positions_behind, row_names
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.hidden_rows import hidden_by_layer, rows_hidden
from recmas_runtime.engines.interface import HandedRows, handed_rows
from recmas_runtime.formats.layers import Rotation
from recmas_runtime.formats.messages import Layers
from recmas_runtime.sequences.moved_keys import turn_by


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a cache, [1, H, P, D] for each of its tensors, and where the first was computed.

    They are handed over to the layers that they are seen by; None for all. The sink is the first
    row of that cache, if they do not begin with it.
    """

    tensors: tuple[Tensor, ...]
    position: int
    seen_by: Layers | None = None
    sink: Rows | None = None

    @property
    def count(self) -> int:
        """How many rows there are, P."""
        return self.tensors[0].shape[2]


def extend(
    backbone: TorchBackbone, cache: Any, embeds_TD: Tensor, handed: Sequence[HandedRows]
) -> Tensor:
    """Run positions behind those in the cache; return their hidden states [T, D]."""
    num_rows = cache.get_seq_length() + len(embeds_TD) if handed else 0
    hidden = hidden_by_layer(backbone.facts, handed, num_rows)
    positions = positions_behind(cache, len(embeds_TD))
    positions = {name: value.to(embeds_TD.device) for name, value in positions.items()}
    with rows_hidden(backbone.body, hidden):
        out = backbone.body(
            inputs_embeds=embeds_TD[None], **with_cache(backbone.body, cache), **positions
        )
    hidden_TD: Tensor = out.last_hidden_state[0]
    return hidden_TD


def cut_rows(tensors: Sequence[Tensor], first: int, last: int) -> Rows:
    """Return rows `first` to `last` of the tensors of a cache, which begin at position 0."""
    top = Rows(tensors=tuple(t[:, :, :1] for t in tensors), position=0) if first else None
    return Rows(tensors=tuple(t[:, :, first:last] for t in tensors), position=first, sink=top)


def join_rows(pieces: Sequence[Rows], backbone: TorchBackbone) -> tuple[Tensor, ...]:
    """Return pieces of rows one behind the other, keys turned to their new positions."""
    if not pieces:
        return ()
    moved, at = [], 0
    for piece in pieces:
        tensors = piece.tensors
        if piece.position != at:
            # None of the layers keeps a state, but some may keep nothing.
            names = row_names(backbone.facts.layers)
            tensors = tuple(
                _turned(rows, backbone.row_positions.of_tensor(name), at - piece.position)
                for name, rows in zip(names, tensors, strict=True)
            )
        moved.append(tensors)
        at += piece.count
    return tuple(torch.cat(parts, dim=2) for parts in zip(*moved, strict=True))


def seen_rows(pieces: Sequence[Rows]) -> tuple[HandedRows, ...]:
    """Return which layers see which rows of pieces that come one behind the other."""
    return handed_rows((piece.count, piece.position, piece.seen_by) for piece in pieces)


def _turned(rows: Tensor, rotation: Rotation | None, offset: int) -> Tensor:
    if rotation is None:
        return rows
    turn = turn_by(offset, rotation, width=rows.shape[-1])
    cosine, sine = (torch.from_numpy(part).to(rows) for part in (turn.cosine, turn.sine))
    return rows * cosine + rows[..., torch.from_numpy(turn.partner)] * sine
