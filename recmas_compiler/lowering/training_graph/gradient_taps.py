"""How much gradient arrives at each link in each round."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor


class GradientTaps:
    """Adds up the gradients of link outputs while backward runs."""

    def __init__(self) -> None:
        self._squares: dict[tuple[str, int], Tensor] = {}

    def tap(self, output: Tensor, link_id: str, round_: int) -> None:
        """Watch what a link gave in a round; outputs without gradients are ignored."""
        if output.requires_grad:
            self._squares.setdefault((link_id, round_), output.new_zeros((), dtype=torch.float32))
            add = partial(self._add, (link_id, round_))
            output.register_hook(add)  # type: ignore[no-untyped-call]

    def norms(self) -> Mapping[tuple[str, int], float]:
        """Return the norm by link id and round, over all records and positions."""
        return {key: float(square.sqrt()) for key, square in self._squares.items()}

    def _add(self, key: tuple[str, int], gradient: Tensor) -> None:
        # No copy to the host here: that would hold up backward at every link.
        self._squares[key] = self._squares[key] + gradient.detach().float().square().sum()
