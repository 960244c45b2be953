"""Layers that keep a state, traced: their cache and their kernel functions.

Modelling files of transformers name the functions that fast kernels can take the place of alike.
While a model is traced, those for many positions compute in float32 and leave one node of ONNX
Runtime's `LinearAttention` each:

    S <- exp(g) S + k (beta (v - (exp(g) S)^T k))^T,  o = scale S^T q      `gated_delta`
    S <- exp(g) S + k v^T,                            o = scale S^T q      `gated`

A position beyond a sample's `length` writes nothing: its g is 0 and so is its beta, or v. The state
of a convolution is what the next position sees of those before: the last inputs before `length`.

Shape legend: B samples, S new positions, C channels, K taps of a convolution, H heads, G key heads
(each for H / G heads), k and v widths of keys and values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.cache_utils import LinearAttentionCacheLayerMixin

OPERATOR: Final = "com.microsoft::LinearAttention"

# As in the kernels of all families that bring keys and queries to unit length.
_UNIT_EPSILON: Final = 1e-6


class PortableStates(LinearAttentionCacheLayerMixin):  # type: ignore[misc]  # it is untyped
    """The states of one layer, by kind and number.

    Args:
        states: By name: `conv`, `recurrent`, or with a number behind that.
        length_B: New positions of each sample.
    """

    def __init__(self, states: Mapping[str, Tensor], length_B: Tensor) -> None:
        numbers = {_place(name)[1] for name in states}
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=1 + max(numbers))
        self._length_B = length_B
        for name, state in states.items():
            kind, number = _place(name)
            self._all(kind)[number] = state
        self.has_previous_state = dict.fromkeys(self.has_previous_state, True)

    def lazy_initialization(self, *_args: object, **_kwargs: object) -> None:
        """Do nothing: the states are there from the start."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, **_others: object
    ) -> Tensor:
        """Return the kept inputs and the new ones [B, C, K-1+S]; keep the last before `length`."""
        past_BCK = self.conv_states[state_idx]
        seen = torch.cat([past_BCK, conv_states], dim=-1)
        at_B1K = self._length_B[:, None, None] + torch.arange(past_BCK.shape[-1])
        kept = torch.gather(seen, 2, at_B1K.expand(-1, past_BCK.shape[1], -1))
        self.conv_states[state_idx] = kept
        return seen

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_others: object
    ) -> Tensor:
        """Keep a new state."""
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states

    def state(self, name: str) -> Tensor:
        """Return what a state has become."""
        kind, number = _place(name)
        return self._all(kind)[number]

    def _all(self, kind: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = getattr(self, f"{kind}_states")
        return found


def _place(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_")
    return kind, int(number or 0)


class StateTrace:
    """What kernels need to know that their callers do not hand them: set at the trace's start."""

    length_B: Tensor

    def real(self, positions: int | torch.SymInt) -> Tensor:
        """Return [B, S, 1], True where a position is a sample's own and not filled up."""
        return (torch.arange(positions) < self.length_B[:, None]).unsqueeze(-1)


@contextmanager
def portable_kernels(model: torch.nn.Module) -> Iterator[StateTrace]:
    """Make a model's modules call kernels that can be traced inside the block."""
    trace = StateTrace()
    files = {type(module).__module__ for module in model.modules()}
    replaced = [
        (module, name, getattr(module, name))
        for module in (sys.modules[name] for name in sorted(files))
        for name in _KERNELS
        if hasattr(module, name)
    ]
    try:
        for module, name, _ in replaced:
            setattr(module, name, _bound(_KERNELS[name], trace))
        yield trace
    finally:
        for module, name, own in replaced:
            setattr(module, name, own)


def _bound(kernel: Callable[..., Any], trace: StateTrace) -> Callable[..., Any]:
    return lambda *args, **kwargs: kernel(trace, *args, **kwargs)


def _convolve(
    _trace: StateTrace,
    hidden_states: Tensor,  # [B, C, K-1+S]
    weight: Tensor,  # [C, K]
    bias: Tensor | None = None,
    activation: str | None = None,
    **_others: object,
) -> Tensor:
    """Return a convolution by channel over kept and new inputs, [B, C, S]."""
    out_BCS = functional.conv1d(hidden_states, weight.unsqueeze(1), bias, groups=weight.shape[0])
    if activation is not None:
        out_BCS = ACT2FN[activation](out_BCS)
    return out_BCS


def _delta_rule(
    trace: StateTrace,
    query: Tensor,  # [B, S, G, k]
    key: Tensor,
    value: Tensor,  # [B, S, H, v]
    g: Tensor,  # [B, S, H] or [B, S, H, k]
    beta: Tensor,  # [B, S, H]
    *_chunk_size: int,
    initial_state: Tensor,  # [B, H, k, v]
    use_qk_l2norm_in_kernel: bool = False,
    **_others: object,
) -> tuple[Tensor, Tensor]:
    """Return [B, S, H, v] and the state after it, of gated DeltaNet and of Kimi's delta attention.

    In the latter every entry of a key has a decay of its own.
    """
    heads, key_width = value.shape[2], key.shape[3]
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    real_BS1 = trace.real(value.shape[1])
    return _scan(
        _for_heads(query, heads),
        _for_heads(key, heads),
        value,
        state=initial_state,
        decay=torch.where(real_BS1, g.flatten(2), 0.0),
        beta=torch.where(real_BS1, beta, 0.0),
        scale=key_width**-0.5,
    )


def _scan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    state: Tensor,
    decay: Tensor,
    scale: float,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the operator's output [B, S, H, v] and its state [B, H, k, v]."""
    batch, positions, heads, width = value.shape
    assert tuple(state.shape[1:]) == (heads, key.shape[3], width), "a state is [B, H, k, v]"
    inputs = [query.flatten(2), key.flatten(2), value.flatten(2), state, decay]
    out, new_state = torch.onnx.ops.symbolic_multi_out(
        OPERATOR,
        [*inputs, beta] if beta is not None else inputs,
        {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "update_rule": "gated" if beta is None else "gated_delta",
            "scale": scale,
        },
        dtypes=(value.dtype, state.dtype),
        shapes=((batch, positions, heads * width), state.shape),
        version=1,
    )
    return out.reshape(batch, positions, heads, width), new_state


def _unit(x: Tensor) -> Tensor:
    """Return x / sqrt(sum x^2 + epsilon): a root-mean-square norm, which is one operator."""
    width = x.shape[-1]
    return torch.onnx.ops.symbolic(
        "RMSNormalization",
        (x, torch.full((width,), width**-0.5)),
        {"axis": -1, "epsilon": _UNIT_EPSILON / width},
        dtype=x.dtype,
        shape=x.shape,
        version=23,
    )


def _for_heads(x_BSGk: Tensor, heads: int) -> Tensor:
    """Return keys for all heads: those that share one are neighbours."""
    shape, groups = x_BSGk.shape, x_BSGk.shape[2]
    if groups == heads:
        return x_BSGk
    repeated = x_BSGk.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1)
    return repeated.reshape(shape[0], shape[1], heads, shape[3])


# By the name in modelling files. Functions for a single position have no part in it: one graph
# serves all lengths.
_KERNELS: Final[Mapping[str, Callable[..., Any]]] = {
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
}
