"""Calls as tensors: ragged rows, padded on the left, so that they end together.

Shape legend: N rows (agents x records), S columns, P shared or constant columns, K key/value heads,
M vectors of a message, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from recmas_runtime.engines.interface import HandedRows

# Splitting costs another call of the backbone, which a few columns are not worth.
FEWEST_CONSTANT_COLUMNS = 16

# What all layers keep, one after the other: keys and values, states.
Rows = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One call of one record.

    Attributes:
        pieces: Token ids and messages [M, D] in order; messages are not empty.
        front: What all layers keep of positions before it; empty for none. A row with a front runs
            alone.
        handed: Which layers see which rows of the front.
    """

    pieces: tuple[tuple[int, ...] | Tensor, ...]
    num_wanted: int
    front: Rows = ()
    handed: tuple[HandedRows, ...] = ()

    @property
    def num_before(self) -> int:
        """How many rows come before it."""
        return self.front[0].shape[2] if self.front else 0

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(len(piece) for piece in self.pieces)

    @property
    def is_constant(self) -> bool:
        """Whether it holds no message, so that nothing which learns changes it."""
        return not self.front and not any(isinstance(piece, Tensor) for piece in self.pieces)

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Token ids before the first message."""
        ids: tuple[int, ...] = ()
        for piece in self.pieces:
            if isinstance(piece, Tensor):
                return ids
            ids += piece
        return ids


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Rows as tensors.

    Attributes:
        embeds_NSD: Zeros where there is padding.
        mask_NS: 0 where there is padding, else 1; None if nothing is to be masked.
        positions_NS: Real positions count from 0 in each row.
        shared_ids: What all rows begin with, in columns before any padding.
        num_constant: Columns before this one hold no message and are not wanted; never fewer than
            there are shared ones.
        constant_ids: Token ids in them, by row; a row has fewer where there is padding.
    """

    embeds_NSD: Tensor
    mask_NS: Tensor | None
    positions_NS: Tensor
    shared_ids: tuple[int, ...]
    num_constant: int
    constant_ids: tuple[tuple[int, ...], ...]

    def split_at(self, end: int) -> Padded:
        """Return the same with so many constant columns, at most as many as there are."""
        spare = self.num_constant - end
        if not spare:
            return self
        ids = tuple(row[: len(row) - spare] for row in self.constant_ids)
        return replace(self, num_constant=end, constant_ids=ids)

    @property
    def next_positions(self) -> Tensor:
        """The positions [N, 1] after the last ones."""
        return self.positions_NS[:, -1:] + 1


def pad_rows(
    rows: Sequence[Row],
    embed: Callable[[Tensor], Tensor],
    *,
    multiple: int,
    always_mask: bool,
    share_up_to: int | None = 0,
    may_split: bool = True,
) -> Padded:
    """Embed rows and pad them to one length.

    Args:
        embed: Gives the embeddings [T, D] of token ids [T]; its device and type are the result's.
        multiple: The number of columns, and those of shared and constant ones, are multiples of
            this.
        share_up_to: What rows begin with is shared if there are at most this many columns; None
            for any number.
        may_split: Whether a call can go on behind its constant columns.
    """
    num_columns = -(-max(row.length for row in rows) // multiple) * multiple
    may_share = share_up_to is None or num_columns <= share_up_to
    shared_ids = _shared_ids(rows, multiple) if may_share else ()
    num_shared = len(shared_ids)
    constant = _num_constant(rows, num_columns, num_shared, multiple) if may_split else 0
    num_constant = max(num_shared, constant)
    embeds_NSD = torch.stack([_embeds(row, embed, num_columns, num_shared) for row in rows])
    spare_N1 = torch.tensor([[num_columns - row.length] for row in rows], device=embeds_NSD.device)
    columns_S = torch.arange(num_columns, device=embeds_NSD.device)
    is_shared_S = columns_S < num_shared
    is_padding_NS = ~is_shared_S & (columns_S < num_shared + spare_N1)
    positions_NS = torch.where(is_shared_S, columns_S, columns_S - spare_N1)
    # Without padding there is nothing to mask, and attention is faster without a mask.
    is_padded = any(row.length < num_columns for row in rows)
    num_ids = [max(num_constant - (num_columns - row.length), num_shared) for row in rows]
    return Padded(
        embeds_NSD=embeds_NSD,
        mask_NS=(~is_padding_NS).long() if always_mask or is_padded else None,
        positions_NS=positions_NS.clamp(min=0),
        shared_ids=shared_ids,
        num_constant=num_constant,
        constant_ids=tuple(row.leading_ids[:n] for row, n in zip(rows, num_ids, strict=True)),
    )


def _shared_ids(rows: Sequence[Row], multiple: int) -> tuple[int, ...]:
    """Return the tokens that all rows begin with, as far as no row's wanted positions."""
    texts = [row.leading_ids[: row.length - row.num_wanted] for row in rows]
    columns = enumerate(zip(*texts, strict=False))
    end = next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, texts)))
    end = end // multiple * multiple
    return texts[0][:end] if end >= FEWEST_CONSTANT_COLUMNS else ()


def _num_constant(rows: Sequence[Row], num_columns: int, num_shared: int, multiple: int) -> int:
    if all(row.is_constant for row in rows):
        return 0  # a call without messages runs once, there is nothing to split off
    ends = (
        num_columns - row.length + min(len(row.leading_ids), row.length - row.num_wanted)
        for row in rows
    )
    constant = min(ends) // multiple * multiple
    return constant if constant - num_shared >= FEWEST_CONSTANT_COLUMNS else 0


def _embeds(
    row: Row, embed: Callable[[Tensor], Tensor], num_columns: int, num_shared: int
) -> Tensor:
    texts = [torch.tensor(piece) for piece in row.pieces if not isinstance(piece, Tensor)]
    # One lookup for all the text of a row.
    embeds_TD = embed(torch.cat(texts))
    text_TD = iter(torch.split(embeds_TD, [len(text) for text in texts]))
    pieces_TD = [
        piece.to(embeds_TD) if isinstance(piece, Tensor) else next(text_TD) for piece in row.pieces
    ]
    shared_TD, rest_TD = torch.tensor_split(torch.cat(pieces_TD), (num_shared,))
    return torch.cat((shared_TD, pad(rest_TD, (0, 0, num_columns - row.length, 0))))
