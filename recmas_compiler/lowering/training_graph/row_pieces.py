"""Cached rows in pieces, and attention over them: nothing is copied from step to step.

A cache that grows by concatenation copies all its rows in every latent step, and keeps each copy
for its gradients. Here rows stay where they were computed: constant ones, which get no gradients,
those of a prompt, and the steps behind it. transformers' cache and attention interfaces are the
only points of contact.

Shape legend: N sequences, S new positions, C rows of a piece, T rows of all pieces, H query heads,
K key/value heads, G query heads per key/value head, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as cached
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recmas_compiler.backbones.loaded.cache_argument import cache_argument
from recmas_compiler.backbones.torch_model import TorchBackbone

_NUM_TRIED: Final = 5
# Rounding, in bfloat16 too; whoever loses rows is off by far more.
_ALIKE: Final = 5e-2

IMPLEMENTATION: Final = "recmas_pieces"

# Where the attention function finds the pieces: it is handed the keys of a call and no cache.
_PIECES: Final = "recmas_pieces"

Piece = tuple[Tensor, Tensor]
"""Keys and values [N, K, C, D]."""


class RowPieces(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """The rows of one layer: a piece for every call of several positions, and one of all steps.

    Args:
        begun: The first piece; None for none.
    """

    def __init__(self, begun: Piece | None) -> None:
        super().__init__()
        self.is_initialized = True
        self._pieces: list[Piece] = [] if begun is None else [(_wide(begun[0]), _wide(begun[1]))]
        self._steps: Piece | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are no rows of one kind to make."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> Piece:
        """Keep new rows; return them alone, with all pieces for the attention function."""
        new = _wide(key_states), _wide(value_states)
        if key_states.shape[2] > 1:
            self._pieces = [*self.pieces, new]
            self._steps = None
        elif self._steps is None:
            self._steps = new
        else:
            keys, values = self._steps
            self._steps = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        shown = key_states.view_as(key_states)
        setattr(shown, _PIECES, self.pieces)
        return shown, value_states

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All rows, in order: steps come last."""
        return tuple(self._pieces) + (() if self._steps is None else (self._steps,))

    def get_seq_length(self) -> int:
        """Return how many rows there are."""
        return sum(keys.shape[2] for keys, _ in self.pieces)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the rows that a mask covers and the position of the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no limit."""
        return -1


def pieces_cache(num_layers: int, kept: Sequence[Tensor]) -> Any:
    """Return a cache that begins with given rows: keys and values of each layer in turn."""
    begun: list[Piece | None] = [None] * num_layers
    if kept:
        begun = list(zip(kept[::2], kept[1::2], strict=True))
    return Cache(layers=[RowPieces(piece) for piece in begun])


def whole_rows(cache: Any, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that gives the rows that a cache of pieces has now.

    These are keys and values of each layer in turn; they are joined when they are first asked for.
    """
    by_layer = [layer.pieces for layer in cache.layers]

    @cached
    def rows() -> tuple[Tensor, ...]:
        return tuple(
            _joined(rows).to(dtype) for pieces in by_layer for rows in zip(*pieces, strict=True)
        )

    return rows


def extend_pieces(
    backbone: TorchBackbone,
    embeds_NSD: Tensor,
    mask_NT: Tensor | None,
    positions_NS: Tensor,
    kept: Any,
) -> tuple[Tensor, Any]:
    """Run positions behind kept rows; return their hidden states and a cache that has them too.

    Args:
        kept: Rows of constant columns, keys and values of each layer in turn, or such a cache,
            which grows.
    """
    body = backbone.body
    cache = pieces_cache(len(backbone.facts.layers), kept) if isinstance(kept, tuple) else kept
    with attending_to_pieces(body):
        out = body(
            inputs_embeds=embeds_NSD,
            attention_mask=mask_NT,
            position_ids=positions_NS,
            use_cache=True,
            **{cache_argument(body): cache},
        )
    return out.last_hidden_state, cache


@torch.no_grad()
def reads_pieces(backbone: TorchBackbone, extend: Callable[..., tuple[Tensor, Any]]) -> bool:
    """Tell whether a backbone finds rows in pieces as it finds them in one, by trying both.

    Attention that is code of a model's own, layers that share rows or keep states, soft caps and
    the like do not.

    Args:
        extend: Runs positions behind rows that are handed to it in one.
    """
    body: Any = backbone.body
    if body.config._attn_implementation != "sdpa" or not all(
        layer.rows is not None and not layer.states for layer in backbone.facts.layers
    ):
        return False
    ids = torch.arange(_NUM_TRIED)[None] % backbone.facts.vocab_size
    embeds = backbone.embed(ids.to(next(body.parameters()).device))
    positions = torch.arange(_NUM_TRIED, device=embeds.device)[None]
    ends = [(0, _NUM_TRIED - 2), (_NUM_TRIED - 2, _NUM_TRIED - 1), (_NUM_TRIED - 1, _NUM_TRIED)]
    expected, kept = [], ()
    found, cache = [], ()
    try:
        for first, end in ends:
            some = embeds[:, first:end], None, positions[:, first:end]
            hidden, kept = extend(*some, *kept)
            expected.append(hidden)
            hidden, cache = extend_pieces(backbone, *some, cache)
            found.append(hidden)
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError):
        return False
    whole, pieces = torch.cat(expected, dim=1).float(), torch.cat(found, dim=1).float()
    return float((whole - pieces).abs().max()) <= _ALIKE * float(whole.abs().max())


@contextmanager
def attending_to_pieces(model: Any) -> Iterator[None]:
    """Have a model's attention find its rows in pieces inside the block."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation_internal = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _attention(
    module: torch.nn.Module,
    query_NHSD: Tensor,
    key_NKSD: Tensor,
    value_NKSD: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to all pieces: the attention interface."""
    pieces: tuple[Piece, ...] | None = getattr(key_NKSD, _PIECES, None)
    assert pieces is not None, "the keys that the cache returned"
    positions, width = query_NHSD.shape[2:]
    is_alone = len(pieces) == 1 and positions > 1
    # Beyond that, scores take more memory than keys and values repeated for every query head.
    is_long = positions > 2 * width
    is_causal = positions > 1 and mask is None  # which transformers reckons from the call's size
    if is_alone or is_long or is_causal or others.get("position_bias") is not None:
        keys, values = key_NKSD, value_NKSD
        if not is_alone:
            keys, values = (_joined(rows).to(keys.dtype) for rows in zip(*pieces, strict=True))
        found, _ = sdpa_attention_forward(
            module, query_NHSD, keys, values, mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    scale = width**-0.5 if scaling is None else scaling
    flat = [rows for piece in pieces for rows in piece]
    out: Tensor = _Attend.apply(query_NHSD, mask, scale, *flat)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


class _Attend(torch.autograd.Function):
    """softmax(q k^T) v over pieces, in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, query_NHSD: Tensor, mask: Tensor | None, scale: float, *rows: Tensor
    ) -> Tensor:
        num, heads, positions, width = query_NHSD.shape
        kv_heads = rows[0].shape[1]
        wide = torch.promote_types(query_NHSD.dtype, torch.float32)
        query = query_NHSD.to(wide).reshape(num, kv_heads, -1, width) * scale
        keys, values = rows[::2], rows[1::2]
        scores = torch.cat([query @ k.transpose(2, 3) for k in keys], dim=-1)
        shape = scores.shape
        total = shape[-1]
        if mask is not None:
            by_head = scores.view(num, kv_heads, -1, positions, total)
            hidden = _added(mask, wide)
            hidden = (
                hidden.view(len(mask), -1, heads // kv_heads, *mask.shape[2:])
                if (mask.shape[1] == heads)
                else hidden[:, :, None]
            )
            scores = (by_head + hidden).view(shape)
        weights = scores.softmax(-1)
        parts = torch.split(weights, [k.shape[2] for k in keys], dim=-1)
        out = sum(
            (part @ v for part, v in zip(parts[1:], values[1:], strict=True)),
            start=parts[0] @ values[0],
        )
        ctx.scale = scale
        ctx.save_for_backward(query_NHSD, weights, *rows)
        found: Tensor = out.view(num, heads, positions, -1).to(query_NHSD.dtype)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query_NHSD, weights, *rows = ctx.saved_tensors
        num, kv_heads, grouped, _ = weights.shape
        keys, values = rows[::2], rows[1::2]
        sizes = [k.shape[2] for k in keys]
        wide = weights.dtype
        out_gradient = gradients[0].to(wide).reshape(num, kv_heads, grouped, -1)
        by_weight = torch.cat([out_gradient @ v.transpose(2, 3) for v in values], dim=-1)
        by_score = torch._softmax_backward_data(by_weight, weights, -1, wide)
        query = query_NHSD.to(wide).reshape(num, kv_heads, grouped, -1) * ctx.scale
        needed = ctx.needs_input_grad[3:]
        found: list[Tensor | None] = []
        scores, parts = (torch.split(by, sizes, dim=-1) for by in (by_score, weights))
        for i, (by, part) in enumerate(zip(scores, parts, strict=True)):
            by_key = by.transpose(2, 3) @ query if needed[2 * i] else None
            by_value = None
            if needed[2 * i + 1]:
                by_value = part.transpose(2, 3) @ out_gradient
            found += [by_key, by_value]
        by_query = sum(
            (by @ k for by, k in zip(scores[1:], keys[1:], strict=True)),
            start=scores[0] @ keys[0],
        )
        by_query = (by_query * ctx.scale).reshape(query_NHSD.shape).to(query_NHSD.dtype)
        return by_query, None, None, *found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


def _wide(rows: Tensor) -> Tensor:
    """Return rows in float32 or wider, as attention reads them in every step."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), dim=2)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
