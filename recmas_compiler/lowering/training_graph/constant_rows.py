"""Cached rows that no link changes: computed once in a batch, whatever rounds read them.

Shape legend: N rows (agents x records), S columns, C columns of what is taken, K key/value heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from recmas_compiler.lowering.training_graph.padded_rows import (
    FEWEST_CONSTANT_COLUMNS,
    Padded,
    Rows,
)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text that was read: its row and first column behind what all rows share."""

    ids: tuple[int, ...]
    row: int
    num_shared: int
    spare: int
    whole: Callable[[], Rows]

    def columns(self, layer: int, first: int, end: int) -> Tensor:
        """Return the rows [1, K, C, D] of the positions from `first` to `end`."""
        rows_1KSD = self.whole()[layer][self.row : self.row + 1]
        behind = rows_1KSD[:, :, max(first, self.num_shared) + self.spare : end + self.spare]
        if first >= self.num_shared:
            return behind
        return torch.cat([rows_1KSD[:, :, first : min(end, self.num_shared)], behind], dim=2)


@dataclass(frozen=True, kw_only=True)
class Known:
    """Columns that were read with other texts: all of a batch's but the last `missing`."""

    padded: Padded
    texts: tuple[_Text, ...]
    missing: int

    @property
    def end(self) -> int:
        """The column behind them."""
        return self.padded.num_constant - self.missing

    def rows(self) -> Rows:
        """Return the rows [N, K, C, D] of these columns, padded as the batch is."""
        end, num_shared = self.end, len(self.padded.shared_ids)
        found: list[Tensor] = []
        for layer in range(len(self.texts[0].whole())):
            by_row = []
            for text, ids in zip(self.texts, self.padded.constant_ids, strict=True):
                count = len(ids) - self.missing
                own = text.columns(layer, num_shared, count)
                padded = pad(own, (0, 0, end - num_shared - own.shape[2], 0))
                if num_shared:
                    padded = torch.cat([text.columns(layer, 0, num_shared), padded], dim=2)
                by_row.append(padded)
            found.append(torch.cat(by_row))
        return tuple(found)


@dataclass(eq=False)
class ConstantRows:
    """What one backbone has read in a batch without any message before it.

    Attributes:
        columns: By first and last column and what rows hold up to it: rows [N, K, C, D].
    """

    columns: dict[tuple[int, int, tuple[tuple[int, ...], ...]], Rows] = field(default_factory=dict)
    _texts: list[_Text] = field(default_factory=list, init=False)

    def note(
        self,
        ids: Sequence[tuple[int, ...]],
        whole: Callable[[], Rows],
        *,
        num_columns: int,
        num_shared: int,
    ) -> None:
        """Keep what rows without messages have left, for others with a shared prefix.

        Args:
            ids: The tokens of each row; all end together, and padding is behind what is shared.
            whole: Gives the rows of all columns; it is called when they are needed.
        """
        for row, own in enumerate(ids):
            spare = num_columns - len(own)
            text = _Text(ids=own, row=row, num_shared=num_shared, spare=spare, whole=whole)
            self._texts.append(text)

    def known(self, padded: Padded) -> Known | None:
        """Return the constant columns of a batch that were read already, if that is worth it."""
        if not self._texts:
            return None
        texts, missing = [], 0
        for ids in padded.constant_ids:
            count, text = max(
                ((_num_alike(text.ids, ids), text) for text in self._texts),
                key=lambda found: found[0],
            )
            texts.append(text)
            missing = max(missing, len(ids) - count)
        num_shared = len(padded.shared_ids)
        num_saved = padded.num_constant - missing - num_shared
        is_short = min(map(len, padded.constant_ids)) - missing < num_shared
        if is_short or num_saved < FEWEST_CONSTANT_COLUMNS:
            return None
        return Known(padded=padded, texts=tuple(texts), missing=missing)


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
