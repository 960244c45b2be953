"""What the executor asks of engines, whoever computes: ONNX Runtime or TensorRT.

Shape legend: R rows, S positions of a call, C cache rows per sample, H key/value heads, D head
width, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from recmas_runtime.engines.onnx.backbone import Floats, Indices, Operands
from recmas_runtime.formats.manifest import BackboneEntry


class KeyValueRows(Protocol):
    """The keys and values of R sequences, each with room for `capacity` positions."""

    @property
    def rows(self) -> int:
        """Sequences, R."""

    @property
    def capacity(self) -> int:
        """Positions per sequence, C; at least what was asked for."""

    def copy_rows(self, source: Any, rows: Sequence[int], positions: int) -> None:
        """Take the first `positions` of the given sequences of another cache, in this order."""

    def read_rows(self, rows: Sequence[int], positions: int) -> list[NDArray[Any]]:
        """Return copies [n, H, positions, D] on the host: keys, values of each layer in turn."""


CacheT = TypeVar("CacheT", bound=KeyValueRows)


class Backbone(Protocol[CacheT]):
    """One backbone's engines; `engines.onnx.backbone.BackboneEngine` says what each call means."""

    @property
    def entry(self) -> BackboneEntry:
        """The backbone's entry in the manifest."""

    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""

    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""

    def new_cache(self, rows: int, capacity: int) -> CacheT:
        """Return a cache for `rows` sequences of at least `capacity` positions."""

    def give_back(self, cache: Any) -> None:
        """Take a cache that its user needs no more."""

    def forward(
        self,
        cache: CacheT,
        inputs_embeds: Floats,
        write_index: Indices,
        last_index: Indices,
        inner: Operands,
    ) -> tuple[Floats, Floats, Floats]:
        """Run S positions of every sequence; returns hidden, last hidden, next embeddings."""

    def rollout(
        self,
        cache: CacheT,
        thought: Floats,
        next_embeds: Floats,
        write_index: Indices,
        inner: Operands,
        num_steps: int,
    ) -> tuple[Floats, Floats]:
        """Continue latent steps; returns thoughts and next embeddings, both [num_steps, R, d]."""
