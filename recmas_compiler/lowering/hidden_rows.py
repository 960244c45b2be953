"""Rows of a cache that some layers do not see, for any model in torch.

An agent may be handed rows of another one's cache that count for some layers only. Positions go on
behind them in every layer; where a layer does not have them, no new position sees them there.
Models make one mask for all layers of a kind, so what is hidden is taken out where a layer's
attention is called.

Shape legend: R sequences, S new positions, C cache rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.facts import BackboneFacts
from recmas_runtime.core.errors import fail
from recmas_runtime.engines.interface import HandedRows

_MASK: Final = "attention_mask"
# Where a model runs its layers several times: how many layers of the cache earlier runs have had.
_OFFSET: Final = "cycle_offset"


@contextmanager
def rows_hidden(body: nn.Module, hidden: Mapping[int, Tensor]) -> Iterator[None]:
    """Hide rows of the cache from layers of a model inside the block, which calls it once or more.

    Args:
        body: A transformers model, whatever its attention is computed by.
        hidden: By layer, boolean [R, C] with all rows that a call sees, its own last: True for
            those that no position of the call sees. R or C may be 1.

    Raises:
        RecmasError: RM300, at the end, where the attention of such a layer was given no mask.
    """
    if not hidden:
        yield
        return
    reached: set[int] = set()
    with ExitStack() as stack:
        for module in _attention_of(body):
            hook = module.register_forward_pre_hook(
                _Hides(module, hidden, reached), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield
    missing = sorted(hidden.keys() - reached)
    if missing:
        raise fail(
            "RM300",
            f"in {type(body).__name__} no attention of layer {missing[0]} takes a mask, so that "
            "rows cannot be hidden from it.",
            hint="Hand the rows to all layers: `layers: all`.",
        )


def hidden_by_layer(
    facts: BackboneFacts, handed: Sequence[HandedRows], num_rows: int
) -> dict[int, Tensor]:
    """Return for `rows_hidden` the rows, [1, C], that each layer does not have of those handed.

    Args:
        handed: To the one sequence, which has `num_rows` of a cache, those of the call included.
    """
    found: dict[int, Tensor] = {}
    for start, stop, seen_by in handed:
        for layer, kind in enumerate(facts.attention):
            if seen_by is not None and layer not in seen_by and kind != "none":
                mask_1C = found.setdefault(layer, torch.zeros(1, num_rows, dtype=torch.bool))
                mask_1C[:, start:stop] = True
    return found


def _attention_of(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost modules that are called with a mask."""
    takers = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and _MASK in inspect.signature(module.forward).parameters
    ]
    for name, module in takers:
        if not any(other.startswith(f"{name}.") for other, _ in takers):
            yield module


class _Hides:
    """Takes rows out of the mask that a module is called with."""

    def __init__(self, module: nn.Module, hidden: Mapping[int, Tensor], reached: set[int]) -> None:
        self._signature = inspect.signature(module.forward)
        self._hidden, self._reached = hidden, reached

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        layer = module.layer_idx + kwargs.get(_OFFSET, 0)
        if layer not in self._hidden:
            return args, kwargs
        self._reached.add(layer)
        given = self._signature.bind(*args, **kwargs)
        hidden_states = next(iter(given.arguments.values()))
        hidden_R11C = self._hidden[layer][:, None, None].to(hidden_states.device)
        mask = given.arguments.get(_MASK)
        if mask is None:
            mask = _causal(hidden_states, hidden_R11C.shape[-1])
        if mask.dtype == torch.bool:
            given.arguments[_MASK] = mask & ~hidden_R11C
        else:
            lowest = torch.full((), torch.finfo(mask.dtype).min, dtype=mask.dtype)
            given.arguments[_MASK] = torch.where(hidden_R11C, lowest.to(mask.device), mask)
        return given.args, given.kwargs


def _causal(hidden_states: Tensor, rows: int) -> Tensor:
    """Return what no mask stands for, [1, 1, S, C], to be added: the call's rows come last."""
    positions, device = hidden_states.shape[1], hidden_states.device
    last_S1 = torch.arange(rows - positions, rows, device=device)[:, None]
    sees_SC = torch.arange(rows, device=device) <= last_S1
    mask_SC = torch.zeros_like(sees_SC, dtype=hidden_states.dtype)
    mask: Tensor = mask_SC.masked_fill(~sees_SC, torch.finfo(hidden_states.dtype).min)[None, None]
    return mask
