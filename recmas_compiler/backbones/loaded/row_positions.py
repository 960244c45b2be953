"""How the rows of a loaded model's cache depend on positions, found by running it at some.

The model reads the same inputs at its first positions and further on. If the rows of the first run,
turned, are those of the others, that is how they depend on positions. What turns, and how fast, is
tried: the model's own tables of frequencies, in each layout and at each end of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import empty_cache, row_names, tensors_of
from recmas_compiler.backbones.loaded.own_head import body_of
from recmas_runtime.formats.layers import LayerShape, Rotation, RowPositions, has_states
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.sequences.moved_keys import FloatArray, moved_keys

_COUNT: Final = 8
# So far the inputs are moved: near, and so far that slow frequencies are told apart, too.
_OFFSETS: Final = (64, 1000)
_NUM_BEFORE: Final = 3
# Frequencies that a model keeps as sines and cosines are those that RoFormer began with.
_USUAL_BASE: Final = 1e4

_LIMIT: Final = TOLERANCES["moved_rows_relative"]

_Rows = dict[str, FloatArray]  # [1, heads, P, D] by the names of a cache's tensors


class RowsStayError(Exception):
    """Rows cannot be moved to other positions; the message says why."""


@torch.no_grad()
def row_positions_of(
    model: Any, layers: Sequence[LayerShape], *, max_positions: int
) -> RowPositions:
    """Return how rows of a causal model's cache depend on the position that they are at.

    Args:
        layers: What its layers keep.
        max_positions: Its longest sequence, of 2 or more.

    Raises:
        RowsStayError: No rotation leads from one position to another.
    """
    if has_states(layers):
        raise RowsStayError("its layers keep states, which have taken in all that was read")
    count = min(_COUNT, max_positions // 2)
    runs = _Runs(model, layers, count=count)
    here = runs.rows_at(0)
    most = max_positions - count
    there = {offset: runs.rows_at(offset) for offset in {min(far, most) for far in _OFFSETS}}
    tables = list(_tables(body_of(model)))
    found: dict[Rotation, int] = {}
    tensors: dict[str, int] = {}
    for name, rows in here.items():
        rotation = _rotation(rows, {offset: moved[name] for offset, moved in there.items()}, tables)
        if rotation is not None:
            tensors[name] = found.setdefault(rotation, len(found))
    positions = RowPositions(rotations=tuple(found), tensors=tensors)
    # Models are given positions above. Where one counts them for itself, that is seen here.
    num_before = min(_NUM_BEFORE, most)
    for name, rows in runs.rows_behind(num_before).items():
        moved = moved_keys(here[name], positions.of_tensor(name), num_before)
        if not _difference(moved, rows) <= _LIMIT:
            raise RowsStayError(
                "behind other rows they are others than at positions that are given"
            )
    return positions


@dataclass(frozen=True)
class _Runs:
    """Calls of a model on equal inputs at different positions."""

    model: Any
    layers: Sequence[LayerShape]
    count: int

    def rows_at(self, offset: int) -> _Rows:
        """Return what all layers keep of the inputs where the first one is at `offset`."""
        return self._rows(self._ids(self.count), self.layers, first=offset)

    def rows_behind(self, num_before: int) -> _Rows:
        """Return what the first layer with rows keeps of the inputs behind other ones.

        Later layers have looked at those.
        """
        attending = next(i for i, layer in enumerate(self.layers) if layer.rows is not None)
        ids = torch.cat([self._ids(num_before) + 1, self._ids(self.count)])
        kept = self._rows(ids, self.layers[: attending + 1], first=0)
        return {name: rows[:, :, num_before:] for name, rows in kept.items()}

    def _ids(self, count: int) -> Tensor:
        size: int = self.model.get_input_embeddings().weight.shape[0]
        return 1 + torch.arange(count) * (size - 2) // count

    def _rows(self, ids: Tensor, layers: Sequence[LayerShape], *, first: int) -> _Rows:
        body, cache = body_of(self.model), empty_cache(self.layers)
        body(
            inputs_embeds=self.model.get_input_embeddings()(ids[None]),
            position_ids=first + torch.arange(len(ids))[None],
            **with_cache(body, cache),
        )
        tensors = (tensor.numpy() for tensor in tensors_of(cache, layers))
        return dict(zip(row_names(layers), tensors, strict=True))


def _tables(body: nn.Module) -> Iterator[tuple[float, ...]]:
    """Yield the tables of frequencies that a model's rotary embeddings have, each once."""
    seen = set()
    for module in body.modules():
        for name, value in (*module.named_buffers(recurse=False), *vars(module).items()):
            if "inv_freq" in name and isinstance(value, Tensor) and value.ndim == 1:
                table = tuple(value.double().tolist())
                if table not in seen:
                    seen.add(table)
                    yield table


def _rotation(
    rows: FloatArray, moved: Mapping[int, FloatArray], tables: Sequence[tuple[float, ...]]
) -> Rotation | None:
    """Return what turns rows into those at each offset; None where they are the same."""
    width = rows.shape[-1]
    error, rotation = _nearest(rows, moved, (None, *_rotations(tables, width=width)))
    if not error <= _LIMIT:
        usual = _usual_table(rows, moved)
        error, rotation = _nearest(rows, moved, (None, *_rotations([usual], width=width)))
    if not error <= _LIMIT:
        raise RowsStayError(
            f"no rotation makes them of those at other positions (relative error {error:.1e})"
        )
    return rotation


def _nearest(
    rows: FloatArray, moved: Mapping[int, FloatArray], tried: Sequence[Rotation | None]
) -> tuple[float, Rotation | None]:
    """Return the one that turns rows into those at each offset best, and its error."""
    errors = [
        max(_difference(moved_keys(rows, rotation, offset), at) for offset, at in moved.items())
        for rotation in tried
    ]
    least = min(errors)
    return least, tried[errors.index(least)]


def _rotations(tables: Sequence[tuple[float, ...]], *, width: int) -> Iterator[Rotation]:
    """Yield what may turn rows of a width. Some models turn the other way."""
    for table in tables:
        at_end = width - 2 * len(table)
        if at_end < 0:
            continue
        for start in dict.fromkeys((0, at_end)):
            for inv_freq in (table, tuple(-value for value in table)):
                yield Rotation(layout="halves", start=start, inv_freq=inv_freq)
                yield Rotation(layout="pairs", start=start, inv_freq=inv_freq)


def _usual_table(rows: FloatArray, moved: Mapping[int, FloatArray]) -> tuple[float, ...]:
    """Return the usual frequencies for as many numbers as turn, of rows that do."""
    changes = np.max([np.abs(other - rows).max(axis=(0, 1, 2)) for other in moved.values()], axis=0)
    places = np.flatnonzero(changes > _LIMIT * np.abs(rows).max())
    count = int(places[-1] - places[0] + 2) // 2
    return tuple(float(_USUAL_BASE ** (-pair / count)) for pair in range(count))


def _difference(found: FloatArray, expected: FloatArray) -> float:
    """Return the largest difference, relative to the largest number."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
