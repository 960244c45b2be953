"""Hidden states that no link can change: computed once, and kept in memory as far as they fit.

A backbone is frozen, so what it reads without messages gives the same states in every step. This is
what makes a sender that only reads its own prompt nearly free.

Shape legend: S positions of a row, D width, K vectors of a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls
from recmas_compiler.lowering.training_graph.constant_rows import ConstantRows
from recmas_compiler.lowering.training_graph.padded_rows import Row

# Of messages of 16 vectors of width 576, some 29,000 records' fit.
MAX_BYTES: Final = 2**30

Places = tuple[tuple[int, ...], ...]
"""Positions of a row by vector: each is the mean of the states at its positions."""

_Key = tuple[str, tuple[int, ...], Places]
_Batch = tuple[str, tuple[tuple[int, ...], ...], int]


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
        self._written: dict[_Batch, list[tuple[int, ...]]] = {}

    def read(
        self, backbone: str, calls: AgentCalls, readings: Sequence[Reading], constants: ConstantRows
    ) -> list[Tensor]:
        """Return the vectors [K, D] of each reading, at least in float32.

        Args:
            backbone: Name of what `calls` runs.
        """
        found: dict[int, Tensor] = {}
        for number, reading in enumerate(readings):
            if not reading.places:
                found[number] = calls.no_states
            elif reading.row.is_constant:
                found[number] = self._constant(backbone, calls, reading)
        left = [number for number in range(len(readings)) if number not in found]
        if left:
            hidden_NSD = calls.read([readings[number].row for number in left], constants)
            for number, hidden_SD in zip(left, hidden_NSD, strict=True):
                found[number] = _means(hidden_SD, readings[number])
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
        if not all(row.is_constant for row in rows):
            return calls.write(rows, max_tokens, constants)
        # Near ties may depend on the rows beside: only the very same batch is not run again.
        key = backbone, tuple(row.leading_ids for row in rows), max_tokens
        if key not in self._written:
            self._written[key] = calls.write(rows, max_tokens, constants)
        return self._written[key]

    def _constant(self, backbone: str, calls: AgentCalls, reading: Reading) -> Tensor:
        """Return the vectors of a row without messages, which runs alone.

        With other rows beside it, its last bits would depend on the step in which it came first.
        """
        key = _key(backbone, reading)
        if key not in self._kept:
            whole = replace(reading.row, num_wanted=reading.row.length)
            (hidden_SD,) = calls.read([whole], ConstantRows())
            vectors_KD = _means(hidden_SD, reading).detach()
            num_bytes = vectors_KD.numel() * vectors_KD.element_size()
            if num_bytes > self._room:
                return vectors_KD
            self._room -= num_bytes
            self._kept[key] = vectors_KD
        return self._kept[key]


def _key(backbone: str, reading: Reading) -> _Key:
    return backbone, reading.row.leading_ids, reading.places


def _means(hidden_SD: Tensor, reading: Reading) -> Tensor:
    """Return the mean of the states at the positions of each vector; the last ones are a row's."""
    hidden_SD = hidden_SD.to(torch.promote_types(hidden_SD.dtype, torch.float32))
    first = reading.row.length - len(hidden_SD)
    if all(len(places) == 1 for places in reading.places):
        return hidden_SD[[place - first for (place,) in reading.places]]
    means = [hidden_SD[[p - first for p in places]].mean(0) for places in reading.places]
    return torch.stack(means)
