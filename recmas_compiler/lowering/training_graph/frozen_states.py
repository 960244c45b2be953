"""Hidden states that no link can change: computed once, and kept in memory as far as they fit.

A backbone is frozen, so what it reads without messages gives the same states in every step. This is
what makes a sender that only reads its own prompt nearly free.

Shape legend: S positions of a row, D width, K vectors of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls, ConstantRows, Row

# Of messages of 16 vectors of width 576, some 29,000 records' fit.
MAX_BYTES: Final = 2**30

Places = tuple[tuple[int, ...], ...]
"""Positions of a row by vector: each is the mean of the states at its positions."""

_Key = tuple[str, tuple[int, ...], Places]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A row to read, and which of its states are wanted."""

    row: Row
    places: Places


class FrozenStates:
    """Reads rows; those without messages only once.

    Args:
        max_bytes: Most memory; states that do not fit are computed anew.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._room = max_bytes
        self._kept: dict[_Key, Tensor] = {}
        self._written: dict[tuple[str, tuple[int, ...], int], tuple[int, ...]] = {}

    def read(
        self, backbone: str, calls: AgentCalls, readings: Sequence[Reading], constants: ConstantRows
    ) -> list[Tensor]:
        """Return the vectors [K, D] of each reading, at least in float32.

        Args:
            backbone: Name of what `calls` runs.
        """
        found: dict[int, Tensor] = {}
        for number, reading in enumerate(readings):
            kept = self._kept.get(_key(backbone, reading))
            if not reading.places:
                found[number] = calls.no_states
            elif kept is not None and reading.row.is_constant:
                found[number] = kept
        left = [number for number in range(len(readings)) if number not in found]
        if left:
            hidden_NSD = calls.read([readings[number].row for number in left], constants)
            for number, hidden_SD in zip(left, hidden_NSD, strict=True):
                reading = readings[number]
                vectors_KD = _means(hidden_SD[-reading.row.num_wanted :], reading)
                found[number] = vectors_KD
                if reading.row.is_constant:
                    self._keep(_key(backbone, reading), vectors_KD.detach())
        return [found[number] for number in range(len(readings))]

    def write(
        self,
        backbone: str,
        calls: AgentCalls,
        rows: Sequence[Row],
        max_tokens: int,
        constants: ConstantRows,
    ) -> list[tuple[int, ...]]:
        """Return what a backbone writes greedily behind each row, without the token that ends it.

        Args:
            backbone: Name of what `calls` runs.
        """
        found: dict[int, tuple[int, ...]] = {}
        keys = [(backbone, row.leading_ids, max_tokens) for row in rows]
        for number, row in enumerate(rows):
            if row.is_constant and keys[number] in self._written:
                found[number] = self._written[keys[number]]
        left = [number for number in range(len(rows)) if number not in found]
        if left:
            texts = calls.write([rows[number] for number in left], max_tokens, constants)
            for number, ids in zip(left, texts, strict=True):
                found[number] = ids
                if rows[number].is_constant:
                    self._written[keys[number]] = ids
        return [found[number] for number in range(len(rows))]

    def _keep(self, key: _Key, vectors_KD: Tensor) -> None:
        num_bytes = vectors_KD.numel() * vectors_KD.element_size()
        if num_bytes <= self._room and key not in self._kept:
            self._room -= num_bytes
            self._kept[key] = vectors_KD


def _key(backbone: str, reading: Reading) -> _Key:
    return backbone, reading.row.leading_ids, reading.places


def _means(hidden_WD: Tensor, reading: Reading) -> Tensor:
    """Return the mean of the states at the positions of each vector."""
    hidden_WD = hidden_WD.to(torch.promote_types(hidden_WD.dtype, torch.float32))
    first = reading.row.length - reading.row.num_wanted
    if all(len(places) == 1 for places in reading.places):
        return hidden_WD[[place - first for (place,) in reading.places]]
    means = [hidden_WD[[p - first for p in places]].mean(0) for places in reading.places]
    return torch.stack(means)
