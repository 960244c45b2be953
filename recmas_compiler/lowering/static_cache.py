"""Attention over a preallocated cache, for any Hugging Face decoder, in plain torch.

Three extension points of transformers and nothing else: the cache class (rows are written at each
sequence's own index), the mask interface (the model's own rule, evaluated at each sequence's own
positions) and the attention interface (each cached row is read once, whatever queries share it).
transformers' own `StaticCache` has one position for the whole batch, which a ragged batch has not.

Shape legend: R sequences, S new positions, C cache rows, H query heads, K key/value heads, G query
heads per key/value head, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

IMPLEMENTATION: Final = "recmas_static"
# The name under which models with attention code of their own find their masks.
OWN_CODE: Final = "recmas_own_code"


class RowsSeen(int):
    """How many rows a cache has while a model is traced: 0, and with it those of each sequence.

    What models reckon from the number sizes masks that nothing reads, or positions that they are
    given. Only the mask interface needs to know better.
    """

    of_each: Tensor

    def __new__(cls, of_each: Tensor) -> Self:
        """Return 0 that knows the rows of each sequence, [R]."""
        seen = super().__new__(cls, 0)
        seen.of_each = of_each
        return seen

    def __add__(self, other: Any) -> Any:
        """Add a number, also one that is not known while a model is traced."""
        return int(self) + other

    __radd__ = __add__


class StaticRows(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer: new rows are written in place at each sequence's own index.

    Args:
        keys: [R, K, C, D].
        values: [R, K, C, D].
        write_index: [R], the row where the first new position goes.
    """

    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, write_index: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.write_index = keys, values, write_index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the rows are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new rows [R, K, S, D] and return the whole cache."""
        num_rows, positions = key_states.shape[0], key_states.shape[2]
        row_R1 = torch.arange(num_rows, device=self.keys.device)[:, None]
        place_RS = self.write_index[:, None] + torch.arange(positions, device=self.keys.device)
        # Indices on both sides of a slice put the indexed axes first: [R, S, K, D].
        self.keys[row_R1, :, place_RS] = key_states.transpose(1, 2)
        self.values[row_R1, :, place_RS] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        """Return the rows of each sequence, [R]; transformers' own layers have one int for all."""
        return self.write_index

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the rows that a mask covers and the position of the first one."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Return the rows there are."""
        return int(self.keys.shape[2])


def static_cache(keys: Sequence[Tensor], values: Sequence[Tensor], write_index: Tensor) -> Any:
    """Return a transformers cache over the given rows, one pair [R, K, C, D] per layer."""
    return Cache(layers=[StaticRows(k, v, write_index) for k, v in zip(keys, values, strict=True)])


def use_static_attention(model: PreTrainedModel) -> None:
    """Make a model attend over static caches from now on."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ragged_mask)
    if has_attention_interface(model):
        model.set_attn_implementation(IMPLEMENTATION)
    else:
        use_added_masks(model)


def has_attention_interface(model: PreTrainedModel) -> bool:
    """Whether a model takes its attention from transformers' interface."""
    found: bool = model._can_set_attn_implementation()
    return found


def use_added_masks(model: PreTrainedModel) -> None:
    """Give a model whose attention is code of its own masks that it adds to its scores."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(OWN_CODE, _added_mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation_internal = OWN_CODE


def ragged_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | RowsSeen,
    kv_offset: int,
    mask_function: Callable[..., Tensor],
    **_others: object,
) -> Tensor:
    """Evaluate a model's mask rule per sequence: the mask interface.

    The rule (causal, sliding, chunked, ...) is a function of indices. transformers evaluates it for
    one offset of the whole batch; here every sequence has its own, its write index.

    Returns:
        Boolean [R, 1, S, C], True where a position may look.
    """
    seen_R = q_offset.of_each if isinstance(q_offset, RowsSeen) else q_offset
    device = seen_R.device
    sample_R = torch.arange(batch_size, device=device)
    query_RS = seen_R[:, None] + torch.arange(q_length, device=device)
    row_C = torch.arange(kv_length, device=device) + kv_offset
    allowed = mask_function(
        sample_R[:, None, None, None],
        torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device),
        query_RS[:, None, :, None],
        row_C[None, None, None, :],
    )
    return allowed.expand(batch_size, 1, q_length, kv_length)


def _added_mask(*, dtype: torch.dtype, **arguments: Any) -> Tensor:
    """Return a mask [R, 1, S, C] to add to scores: the mask interface of code of their own."""
    allowed = ragged_mask(**arguments)
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=allowed.device)
    return torch.where(allowed, torch.zeros_like(lowest), lowest)


def _attention(
    module: torch.nn.Module,
    query_RHSD: Tensor,
    key_RKCD: Tensor,
    value_RKCD: Tensor,
    mask_R1SC: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_others: object,
) -> tuple[Tensor, None]:
    """Attend over the whole cache under a mask: the attention interface."""
    num_rows, num_heads, positions, width = query_RHSD.shape
    scale = width**-0.5 if scaling is None else scaling
    if positions > 1:
        out_RHSD = _attend(query_RHSD, key_RKCD, value_RKCD, mask_R1SC, scale, softcap)
        return out_RHSD.transpose(1, 2), None
    # Of one position, the query heads that share a key/value head are as good as positions: rows
    # of one product, so that nothing is repeated in memory.
    query_RKGD = query_RHSD.reshape(num_rows, key_RKCD.shape[1], -1, width)
    mask_R1GC = mask_R1SC.expand(-1, -1, query_RKGD.shape[2], -1)
    out_RKGD = _attend(query_RKGD, key_RKCD, value_RKCD, mask_R1GC, scale, softcap)
    return out_RKGD.reshape(num_rows, 1, num_heads, -1), None


def _attend(
    query_RHSD: Tensor,
    key_RKCD: Tensor,
    value_RKCD: Tensor,
    mask_R1SC: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return softmax(q k^T) v [R, H, S, D]; torch's fused kernels know no soft cap."""
    if not softcap:
        return scaled_dot_product_attention(
            query_RHSD, key_RKCD, value_RKCD, attn_mask=mask_R1SC, scale=scale, enable_gqa=True
        )
    groups = query_RHSD.shape[1] // key_RKCD.shape[1]
    keys, values = (rows.repeat_interleave(groups, 1) for rows in (key_RKCD, value_RKCD))
    scores_RHSC = torch.tanh(query_RHSD @ keys.transpose(2, 3) * scale / softcap) * softcap
    return torch.where(mask_R1SC, scores_RHSC, -torch.inf).softmax(-1) @ values
