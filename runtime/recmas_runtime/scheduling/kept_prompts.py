"""Beginnings of prompts that are kept for other runs: cache rows by what they were computed from.

A row depends on all inputs up to its own and on nothing else, so blocks of rows are kept under the
digest of those inputs, latent vectors included. What was used last stays, within a budget.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.engines.interface import Floats

# Positions of a block. Smaller ones find more and copy in more pieces.
BLOCK: Final = 16


@dataclass(frozen=True, kw_only=True)
class KeptBlock:
    """Rows of a block of positions.

    Attributes:
        rows: [1, H, BLOCK, D], in the order of `formats.layers.cache_tensors`.
        hidden: [BLOCK, d], the final hidden states.
    """

    rows: Sequence[NDArray[Any]]
    hidden: Floats

    @property
    def num_bytes(self) -> int:
        """Size of the block."""
        return self.hidden.nbytes + sum(array.nbytes for array in self.rows)


class KeptPrompts:
    """Blocks of one backbone, within a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._blocks: OrderedDict[bytes, KeptBlock] = OrderedDict()
        self.num_bytes = 0

    @property
    def takes_any(self) -> bool:
        """Whether anything is kept at all."""
        return self._most_bytes > 0

    def beginning(self, keys: Sequence[bytes]) -> list[KeptBlock]:
        """Return the kept blocks that a prompt begins with, given the keys of its blocks."""
        found: list[KeptBlock] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        # The first one last: without it the others cannot be found.
        for key in reversed(keys[: len(found)]):
            self._blocks.move_to_end(key)
        return found

    def keep(self, key: bytes, block: KeptBlock) -> None:
        """Keep a block, in place of those that were used longest ago."""
        if key in self._blocks or block.num_bytes > self._most_bytes:
            return
        self._blocks[key] = block
        self.num_bytes += block.num_bytes
        while self.num_bytes > self._most_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self.num_bytes = 0


def block_keys(embeds: Floats) -> Iterator[bytes]:
    """Return a key for every whole block of a prompt's inputs [T, d], but for its last position."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, (len(embeds) - 1) // BLOCK * BLOCK, BLOCK):
        digest.update(np.ascontiguousarray(embeds[start : start + BLOCK]).data)
        yield digest.digest()
