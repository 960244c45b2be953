"""What the compiler knows of a backbone without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionKind = Literal["full", "sliding", "linear"]


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Dimensions and identity of a backbone, read from its config without torch.

    Attributes:
        source: As the spec names it, e.g. `builtin:smollm2-135m-instruct`.
        identity: Equal for equal weights as far as names can tell: the source with its revision
            resolved, or the folder's absolute path. Link files made for others are refused.
        model_type: Hugging Face model type.
        width: Hidden width, d. Input embeddings have the same width.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding table.
        max_positions: Longest sequence the backbone was made for.
        attention: Kind of each layer, in order; `len(attention) == num_layers`.
        sliding_window: Window of the sliding layers in positions; None if there are none.
        num_parameters: Parameters, embedding table included once.
        num_tables: Tables of the vocabulary among them: 1 where head and embedding are tied, else
            2.
    """

    source: str
    identity: str
    model_type: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    attention: tuple[AttentionKind, ...]
    sliding_window: int | None
    num_parameters: int
    num_tables: int = 1
