"""What a layer of a backbone keeps of a sequence, and the tensors of a cache that follow from it.

Rows are keys and values, one of each for every position: forgetting is a smaller write index. A
state has the same size whatever it has seen, cannot be cut back, and is float32 whatever the
weights are. A layer has rows, states, both, or neither (an MLP alone, or one that attends over the
rows of another layer).

Keys may be turned for the position that they are at (rotary position embeddings), in each layer in
another way or not at all. Where a layer keeps what keys and values are made of, the part of a key
that turns is in the place of the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal, NamedTuple

from msgspec import Meta

from recmas_runtime.formats.codec import Dim, Finite, StrictStruct

MOST_LAYERS = 4096

# The decoder's input that says which rows of a cache no new position sees.
HIDDEN_ROWS: Final = "hidden_rows"

# The branch of a decoder that computes prompts, where they have weights of their own.
PROMPT_BRANCH: Final = "prompt"

# Of a float32 number, which a state consists of.
_ELEMENT_BYTES = 4

_Heads = Annotated[int, Meta(ge=1, le=2**16)]
_Width = Annotated[int, Meta(ge=1, le=2**16)]


class RowsShape(StrictStruct, frozen=True, kw_only=True):
    """Keys [heads, key_width] and values [heads, value_width] of every position."""

    heads: _Heads
    key_width: _Width
    value_width: _Width

    @property
    def elements(self) -> int:
        """Numbers of one position."""
        return self.heads * (self.key_width + self.value_width)


class StateShape(StrictStruct, frozen=True, kw_only=True):
    """A state of one sequence, by its name: `conv`, `recurrent`, or with a number behind that."""

    name: Annotated[str, Meta(pattern=r"^[a-z]+(_[0-9]+)?$", max_length=32)]
    shape: Annotated[tuple[Dim, ...], Meta(min_length=1, max_length=8)]

    @property
    def elements(self) -> int:
        """Numbers of one sequence."""
        return math.prod(self.shape)


def state_name(kind: str, number: int) -> str:
    """Return the name of a state: a layer counts those of a kind from 0."""
    return kind if number == 0 else f"{kind}_{number}"


def state_place(name: str) -> tuple[str, int]:
    """Return the kind and the number of a state, see `state_name`."""
    kind, _, number = name.partition("_")
    return kind, int(number or 0)


class LayerShape(StrictStruct, frozen=True, kw_only=True):
    """What one layer keeps."""

    rows: RowsShape | None = None
    states: tuple[StateShape, ...] = ()


class Rotation(StrictStruct, frozen=True, kw_only=True):
    """How a row of a cache is turned for its position: pairs of its numbers, each by an angle.

    At position p pair i is turned by p * inv_freq[i], from the first number of the pair towards the
    second. Numbers before `start` and behind the last pair are the same at every position.

    Attributes:
        layout: `halves`: of n pairs, pair i is made of the numbers start + i and start + n + i.
            `pairs`: of start + 2 i and start + 2 i + 1.
        start: The first number that turns.
        inv_freq: By pair, in radians per position.
    """

    layout: Literal["halves", "pairs"]
    start: Annotated[int, Meta(ge=0, le=2**16 - 1)]
    inv_freq: Annotated[tuple[Finite, ...], Meta(min_length=1, max_length=2**15)]

    @property
    def end(self) -> int:
        """The first number behind the pairs."""
        return self.start + 2 * len(self.inv_freq)


class RowPositions(StrictStruct, frozen=True, kw_only=True):
    """How the rows of a backbone's cache depend on the position that they are at.

    Attributes:
        rotations: Those that there are.
        tensors: By name of a cache's tensor, such as `key.0`, the index of its rotation. Rows of
            tensors that are not named are the same at every position.
    """

    rotations: Annotated[tuple[Rotation, ...], Meta(max_length=MOST_LAYERS)]
    tensors: dict[str, Annotated[int, Meta(ge=0, le=MOST_LAYERS - 1)]]

    def of_tensor(self, name: str) -> Rotation | None:
        """Return how the rows of a tensor are turned; None where they are not."""
        index = self.tensors.get(name)
        return None if index is None else self.rotations[index]


class CacheTensor(NamedTuple):
    """A tensor of a cache: an input of the decoder by this name, an output as `present_` and it.

    Attributes:
        shape: Of one sequence: a state's own; of rows (heads, width), for every position.
    """

    name: str
    shape: tuple[int, ...]
    is_state: bool

    def whole(self, rows: int, capacity: int) -> tuple[int, ...]:
        """Return the shape for some sequences: [R, heads, C, width], or [R, ...] of a state."""
        if self.is_state:
            return (rows, *self.shape)
        heads, width = self.shape
        return rows, heads, capacity, width


def cache_tensors(layers: Sequence[LayerShape]) -> tuple[CacheTensor, ...]:
    """Return the tensors of a cache in the order of the decoder's inputs.

    These are `key.I` of all layers I that have rows, then `value.I`, then the states, each by its
    name and the layer.
    """
    with_rows = [(i, layer.rows) for i, layer in enumerate(layers) if layer.rows is not None]
    keys = [CacheTensor(f"key.{i}", (r.heads, r.key_width), False) for i, r in with_rows]
    values = [CacheTensor(f"value.{i}", (r.heads, r.value_width), False) for i, r in with_rows]
    states = [
        CacheTensor(f"{state.name}.{i}", state.shape, True)
        for i, layer in enumerate(layers)
        for state in layer.states
    ]
    return (*keys, *values, *states)


def hidden_rows_tensor(num_masks: int) -> CacheTensor:
    """Return the masks of a cache, [R, masks, C, 1], True for rows that are not seen.

    They go where rows go, and are an input of the decoder only.
    """
    return CacheTensor(HIDDEN_ROWS, (num_masks, 1), is_state=False)


def is_rows(name: str) -> bool:
    """Tell by its name whether a tensor of a cache has rows."""
    return name.startswith(("key.", "value."))


def elements_per_position(layers: Iterable[LayerShape]) -> int:
    """Return how many numbers all layers keep of a position."""
    return sum(layer.rows.elements for layer in layers if layer.rows is not None)


def elements_of_states(layers: Iterable[LayerShape]) -> int:
    """Return how many numbers all states of a sequence have."""
    return sum(state.elements for layer in layers for state in layer.states)


def states_bytes(layers: Iterable[LayerShape]) -> int:
    """Return the bytes of all states of one sequence."""
    return _ELEMENT_BYTES * elements_of_states(layers)


def sequence_bytes(
    layers: Sequence[LayerShape],
    capacity: int,
    *,
    num_masks: int = 0,
    element_bytes: int = _ELEMENT_BYTES,
) -> int:
    """Return the bytes that a cache of so many positions takes for one sequence.

    Numbers of keys and values have so many bytes, states are float32. A state is there twice: as it
    was, which a call reads, and as it is made. Each of the masks that hide rows has one byte for a
    position.
    """
    rows = (element_bytes * elements_per_position(layers) + num_masks) * capacity
    return rows + 2 * states_bytes(layers)


def has_states(layers: Iterable[LayerShape]) -> bool:
    """Tell whether a layer keeps a state, so that sequences cannot be cut back."""
    return any(layer.states for layer in layers)


def uniform_layers(
    num_layers: int, *, heads: int, key_width: int, value_width: int | None = None
) -> tuple[LayerShape, ...]:
    """Return layers that all keep rows of one shape."""
    rows = RowsShape(
        heads=heads,
        key_width=key_width,
        value_width=key_width if value_width is None else value_width,
    )
    return (LayerShape(rows=rows),) * num_layers
