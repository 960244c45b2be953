"""Caches of transformers for a loaded model whose calls keep gradients and go on from another's.

transformers' own layers of states write them in place, which gradients do not survive.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from recmas_runtime.formats.layers import LayerShape, has_states, state_name, state_place


class KeptStates(LinearAttentionCacheLayerMixin):  # type: ignore[misc]  # it is untyped
    """The states of one layer, each a tensor of its own after every call."""

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=number_of_states)
        # A layer that is to remember updates its convolution's state through the cache, of one
        # position too, and not in place.
        self.record_past = True

    def lazy_initialization(self, *_args: object, **_kwargs: object) -> None:
        """Do nothing: a state is made by the first call."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int = 0, **_others: object
    ) -> Tensor:
        """Return the kept inputs and the new ones; keep what the next position sees of them."""
        past = self.conv_states[state_idx]
        if past is None:
            seen = pad(conv_states, (conv_kernel_size - 1, 0))
        else:
            seen = torch.cat([past, conv_states], dim=-1)
        self.keep(state_name("conv", state_idx), seen[..., 1 - conv_kernel_size :])
        return seen

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_others: object
    ) -> Tensor:
        """Keep a new state."""
        self.keep(state_name("recurrent", state_idx), recurrent_states)
        return recurrent_states

    def keep(self, name: str, state: Tensor) -> None:
        """Keep a state, by its name in `LayerShape`."""
        kind, number = state_place(name)
        getattr(self, f"{kind}_states")[number] = state
        self.has_previous_state[number] = True

    def state(self, name: str) -> Tensor:
        """Return a state by its name in `LayerShape`."""
        kind, number = state_place(name)
        found: Tensor = getattr(self, f"{kind}_states")[number]
        return found


class _Assigned(Tensor):
    """A state that a layer of one position writes in place: it becomes another tensor instead."""

    keep: Callable[[Tensor], None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute with the plain tensor; what is copied into it is kept."""
        if func is Tensor.copy_ and isinstance(args[0], _Assigned):
            args[0].keep(args[1])
            return args[1]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _StateCache(Cache):  # type: ignore[misc]
    """A cache whose states are written by assignment."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """Return a state that gradients may go through, whatever its layer does with it."""
        found = super().get_conv_state(layer_idx, state_idx)
        return self._assigned(found, layer_idx, state_name("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """Return such a state."""
        found = super().get_recurrent_state(layer_idx, state_idx)
        return self._assigned(found, layer_idx, state_name("recurrent", state_idx))

    def _assigned(self, found: Tensor | None, layer_idx: int, name: str) -> Any:
        if found is None:
            return None
        state, layer = found.as_subclass(_Assigned), self.layers[layer_idx]
        state.keep = lambda made: layer.keep(name, made)
        return state


class KeptRowsAndStates(KeptStates, DynamicLayer):  # type: ignore[misc]
    """A layer that keeps both."""

    def __init__(self, number_of_states: int = 1) -> None:
        DynamicLayer.__init__(self)
        KeptStates.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Begin with no rows."""
        DynamicLayer.lazy_initialization(self, *args, **kwargs)


def empty_cache(layers: Sequence[LayerShape]) -> Any:
    """Return a cache that keeps every row, in sliding layers too, and states where there are any.

    Rows can be cropped where no layer has a state.
    """
    if not has_states(layers):
        return DynamicCache()
    return _StateCache(layers=[_empty_layer(layer) for layer in layers])


def positions_behind(cache: Any, count: int) -> dict[str, Tensor]:
    """Return the argument that tells positions behind those in a cache, where one is needed.

    Some models with states count the positions of a step from 0 if they are not told.
    """
    if not any(isinstance(layer, KeptStates) for layer in cache.layers):
        return {}
    rows = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if not rows:
        return {}
    return {"position_ids": torch.arange(count)[None] + rows[0].get_seq_length()}


def padding_mask(layers: Sequence[LayerShape], mask_NS: Tensor, count: int) -> Tensor:
    """Return the padding mask of the last positions of a text for a call of them.

    Attention takes that of the whole text. Models that only keep states take the call's own part,
    and would stretch a step over the columns of a longer one.
    """
    has_rows = any(layer.rows is not None for layer in layers)
    return mask_NS if has_rows else mask_NS[:, -count:]


def goes_on(model: Any) -> bool:
    """Tell whether a call of some positions goes on from the states of another one.

    Mamba-1's does not in transformers: the function that scans is not handed the state.
    """
    files = {type(module).__module__ for module in model.modules()}
    return not any(hasattr(sys.modules[name], "mamba_selective_scan") for name in files)


def _empty_layer(layer: LayerShape) -> CacheLayerMixin | KeptStates:
    if not layer.states:
        return DynamicLayer()
    number = 1 + max(state_place(state.name)[1] for state in layer.states)
    return KeptStates(number) if layer.rows is None else KeptRowsAndStates(number)


def cache_of(layers: Sequence[LayerShape], tensors: Sequence[Tensor]) -> Any:
    """Return a cache that goes on from the tensors of another one; an empty one for none."""
    cache, left = empty_cache(layers), iter(tensors)
    if not tensors:
        return cache
    for i, layer in enumerate(layers):
        if layer.rows is not None:
            cache.update(next(left), next(left), i)
        for state in layer.states:
            cache.layers[i].keep(state.name, next(left))
    return cache


def tensors_of(cache: Any, layers: Sequence[LayerShape]) -> tuple[Tensor, ...]:
    """Return what a cache holds, layer by layer: keys, values, states."""
    found: list[Tensor] = []
    for kept, layer in zip(cache.layers, layers, strict=False):
        if layer.rows is not None:
            found += [kept.keys, kept.values]
        found += [kept.state(state.name) for state in layer.states]
    return tuple(found)


def row_names(layers: Sequence[LayerShape]) -> tuple[str, ...]:
    """Return the names of what `tensors_of` returns for layers that keep rows, or nothing."""
    with_rows = [i for i, layer in enumerate(layers) if layer.rows is not None]
    return tuple(f"{kind}.{i}" for i in with_rows for kind in ("key", "value"))
