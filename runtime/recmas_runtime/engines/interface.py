"""What the executor asks of engines, whoever computes: ONNX Runtime or TensorRT.

Shape legend: R rows, S positions of a call, C cache rows per sample, H key/value heads, D head
width, d model width, V vocabulary, G groups of rows with one link each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.formats.manifest import BackboneEntry

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
# Of the inner links of a call, see `formats.links.load_operands`; the first axis is G.
Operands = Mapping[str, NDArray[Any]]


LOWER_BATCH: Final = "Lower --batch, shorten the records, or free memory."
# At load nothing runs yet, so that batches are no remedy.
FREE_MEMORY: Final = "Free memory, or build with a smaller precision or backbone."


class OutOfMemoryError(RecmasError):
    """RM507: memory runs out. A smaller batch may have room.

    Args:
        what: What there is no memory for, a sentence without its full stop.
    """

    def __init__(self, what: str, hint: str = LOWER_BATCH) -> None:
        super().__init__(Problem(code="RM507", message=f"memory runs out: {what}", hint=hint))

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> OutOfMemoryError:
        """Return such an error of problems that were told already."""
        made = cls("")
        RecmasError.__init__(made, problems)
        return made


def keeps_rows_only(engine: str) -> RecmasError:
    """Return RM203 for an engine whose caches have no layer states."""
    return fail(
        "RM203",
        f"{engine} goes back to no layer states, which this backbone keeps",
        hint="Run it on ONNX Runtime: device `cpu` or `cuda`.",
    )


def sees_all_rows(engine: str) -> RecmasError:
    """Return RM203 for an engine that hides no rows from any layer."""
    return fail(
        "RM203",
        f"{engine} shows the rows of a cache to every layer, and here some must not see them",
        hint="Run it on ONNX Runtime: device `cpu` or `cuda`.",
    )


class PieceOfRows(Protocol):
    """Rows of one cache that are handed over together."""

    @property
    def position(self) -> int:
        """Where the first of them was computed."""

    @property
    def sink(self) -> Self | None:
        """The first row of that cache, if it is not among them."""


_Piece = TypeVar("_Piece", bound=PieceOfRows)


def behind_sink(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Return pieces of rows that come one behind the other, with a first row that may be one.

    A model learns to turn attention that belongs nowhere to the first row of a sequence (attention
    sinks, arXiv 2309.17453). Rows that were computed behind others do not hold one; behind them
    alone a model writes nonsense. So if they come first, the first row of the cache they are from
    comes before them.
    """
    sink = pieces[0].sink if pieces else None
    return [*pieces] if sink is None else [sink, *pieces]


class HandedRows(NamedTuple):
    """Rows of a sequence, positions `start` to `stop`; None of `seen_by` means all layers."""

    start: int
    stop: int
    seen_by: Collection[int] | None


def handed_rows(
    pieces: Iterable[tuple[int, int, Collection[int] | None]],
) -> tuple[HandedRows, ...]:
    """Return which layers have which rows of pieces that come one behind the other, from 0 on.

    The first row of a sequence counts as every layer's if it was the first where it was computed,
    too. Models turn attention that belongs nowhere to it (attention sinks, arXiv 2309.17453), and a
    layer that misses it is worse off than with nothing handed over.

    Args:
        pieces: For each how many rows it has, at which position the first of them was computed, and
            the layers that they are handed over to; None for all.
    """
    found, at = [], 0
    for count, position, seen_by in pieces:
        is_sink = at == 0 and position == 0
        found.append(HandedRows(min(1, count) if is_sink else at, at + count, seen_by))
        at += count
    return tuple(found)


def masks_of(
    masked_layers: Sequence[Sequence[int]], handed: Sequence[HandedRows], capacity: int
) -> NDArray[np.bool_]:
    """Return the masks of one sequence, [masks, C]: True for rows that a group does not see.

    Args:
        masked_layers: Of the backbone's entry in the manifest.
        handed: Rows whose layers see them as groups, all of one or none.
        capacity: C.
    """
    masks = np.zeros((len(masked_layers), capacity), np.bool_)
    for start, stop, seen_by in handed:
        for mask_C, group in zip(masks, masked_layers, strict=True):
            seeing = {seen_by is None or layer in seen_by for layer in group}
            assert len(seeing) == 1, f"layers {group} have one mask and see different rows"
            mask_C[start:stop] = not seeing.pop()
    return masks


class KeyValueRows(Protocol):
    """The keys and values of R sequences, each with room for `capacity` positions."""

    @property
    def rows(self) -> int:
        """Sequences, R."""

    @property
    def capacity(self) -> int:
        """Positions per sequence, C; at least what was asked for."""

    def copy_rows(self, source: Any, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order.

        States come as they are: whoever goes on behind these positions must know that they are
        those of the same position, or restore others.
        """

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies on the host, in the order of `formats.layers.cache_tensors`.

        Keys and values are [n, H, positions, D]; states are whole.
        """

    def hide_rows(self, row: int, handed: Sequence[HandedRows]) -> None:
        """Let no later position of a sequence see rows from layers that do not have them.

        What is written there for these layers never matters, so long as it is finite. It holds
        until this is called again, or the sequence begins anew; the rows take it along.

        Args:
            row: The sequence.
            handed: All of its rows that were handed over; what was said before is forgotten.
        """

    def write_rows(self, values: Sequence[NDArray[Any]]) -> None:
        """Overwrite the beginning of all sequences with rows of the host, as `read_rows` has them.

        Args:
            values: [R, H, positions, D], in the order of `formats.layers.cache_tensors`; of layers
                that keep no state.
        """

    def save_states(self) -> Any:
        """Return a copy of the layer states of all sequences, for `restore_states`."""

    def restore_states(self, saved: Any, rows: Mapping[int, int]) -> None:
        """Overwrite the layer states of some sequences; their keys and values stay.

        Args:
            saved: What `save_states` of a cache of this backbone gave.
            rows: By sequence of this cache, the one whose states it takes.
        """


CacheT = TypeVar("CacheT", bound=KeyValueRows)


class Backbone(Protocol[CacheT]):
    """One backbone's engines."""

    @property
    def entry(self) -> BackboneEntry:
        """The backbone's entry in the manifest."""

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""

    def new_cache(self, rows: int, capacity: int) -> CacheT:
        """Return a cache for `rows` sequences of at least `capacity` positions."""

    def release(self, cache: Any) -> None:
        """Take a cache that its user needs no more."""

    def drop_idle(self) -> None:
        """Free what is kept for later batches: memory is short."""

    def forward(
        self,
        cache: CacheT,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence through the backbone and extend the cache.

        Args:
            cache: Is written at `write_index .. write_index + S`. States go on from where they are,
                but for sequences that begin.
            inputs_embeds: [R, S, d]; what lies after a sequence's last real position is ignored.
            write_index: [R], the position of each sequence's first input; 0 begins it anew.
            last_index: [R], each sequence's last real input, counted within S; -1 for a sequence
                that has none: its state stays as it is.
            inner: Of G groups with R = G * B.

        Returns:
            Hidden states [R, S, d], the last real one [R, 1, d], and its inner link's output
            [R, 1, d].
        """

    def read_draft(
        self, cache: CacheT, inputs_embeds: Floats, write_index: Indices, inner: Operands
    ) -> Floats:
        """Run a token of one sequence and those that are drafted behind it, or fewer of them.

        An engine that others wait for runs the first token beside theirs and leaves the draft.

        Args:
            cache: Of one sequence; is written at `write_index .. write_index + S`.
            inputs_embeds: [1, S, d].
            write_index: [1], the position of the first token, behind others.
            inner: Of one group.

        Returns:
            Hidden states [1, n, d] of the first n tokens, 1 <= n <= S.
        """

    def rollout(
        self,
        cache: CacheT,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps from a prefill's last position.

        The first thought is the prefill's own, so `num_steps - 1` positions are run.

        Args:
            cache: Is extended by `num_steps - 1` positions.
            thought: [R, 1, d], the hidden state at the last prompt position.
            next_embeds: [R, 1, d], its inner link's output.
            write_index: [R], the position after the prompt.
            inner: As in `forward`.
            num_steps: At least 1.

        Returns:
            Thoughts and their inner links' outputs, both [num_steps, R, d].
        """
