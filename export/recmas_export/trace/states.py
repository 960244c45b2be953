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
from transformers.cache_utils import Cache

from recmas_compiler.backbones.loaded.own_cache import KeptStates
from recmas_runtime.formats.layers import state_name, state_place

OPERATOR: Final = "com.microsoft::LinearAttention"

# As in the kernels of all families that bring keys and queries to unit length.
_UNIT_EPSILON: Final = 1e-6


class PortableStates(KeptStates):
    """The states of one layer, of which what a sample is filled up with becomes no part.

    Args:
        states: By name: `conv`, `recurrent`, or with a number behind that.
        length_B: New positions of each sample.
    """

    def __init__(self, states: Mapping[str, Tensor], length_B: Tensor) -> None:
        KeptStates.__init__(self, 1 + max(state_place(name)[1] for name in states))
        self._length_B = length_B
        for name, state in states.items():
            self.keep(name, state)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int = 0, **_others: object
    ) -> Tensor:
        """Return the kept inputs and the new ones [B, C, K-1+S]; keep the last before `length`."""
        past_BCK = self.conv_states[state_idx]
        seen = torch.cat([past_BCK, conv_states], dim=-1)
        at_B1K = self._length_B[:, None, None] + torch.arange(past_BCK.shape[-1])
        kept = torch.gather(seen, 2, at_B1K.expand(-1, past_BCK.shape[1], -1))
        self.keep(state_name("conv", state_idx), kept)
        return seen


class StateTrace:
    """What kernels need to know that their callers do not hand them.

    Attributes:
        length_B: New positions of each sample; set where the trace begins.
        asked: The recurrent state that the layer in progress has asked the cache for.
        num_scans: Scans of this layer so far.
    """

    length_B: Tensor
    asked: Tensor
    num_scans = 0

    def real(self, positions: Any) -> Tensor:
        """Return [B, S, 1], True where a position is a sample's own and not filled up."""
        return (torch.arange(positions) < self.length_B[:, None]).unsqueeze(-1)


class StateCache(Cache):  # type: ignore[misc]
    """A cache that lets kernels know which state a layer has asked for."""

    def __init__(self, layers: list[Any], trace: StateTrace) -> None:
        super().__init__(layers=layers)
        self._trace = trace

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """Return a state."""
        found = super().get_recurrent_state(layer_idx, state_idx)
        self._trace.asked, self._trace.num_scans = found, 0
        return found


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


def _scan_by_head(
    trace: StateTrace,
    hidden_states: Tensor,  # [B, S, H, v]
    dt: Tensor,  # [B, S, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, S, G, k]
    C: Tensor,
    *_chunk_size: int,
    D: Tensor,  # [H]
    dt_bias: Tensor | None,
    initial_states: Tensor,  # [B, H, k, v]
    dt_softplus: bool,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **_others: object,
) -> tuple[Tensor, Tensor]:
    """Return [B, S, H, v] and the state after it, of Mamba-2.

    A time step is limited as in the form for many positions: that for one has no limit, so that
    some models of transformers give numbers for a prompt that they do not give for its steps.
    """
    dt_BSH = _time_step(dt, dt_bias, dt_softplus)
    if tuple(dt_limit) != (0.0, float("inf")):
        dt_BSH = dt_BSH.clamp(*dt_limit)
    heads, real_BS1 = hidden_states.shape[2], trace.real(dt.shape[1])
    out, state = _scan(
        _for_heads(C, heads),
        _for_heads(B, heads),
        hidden_states * torch.where(real_BS1, dt_BSH, 0.0).unsqueeze(-1),
        state=initial_states,
        decay=torch.where(real_BS1, dt_BSH * A, 0.0),
        scale=1.0,
    )
    return out + hidden_states * D.unsqueeze(-1), state


def _scan_by_channel(
    trace: StateTrace,
    hidden_states: Tensor,  # [B, C, S]
    dt: Tensor,  # [B, C, S]
    A: Tensor,  # [C, k]
    B: Tensor,  # [B, k, S]
    C: Tensor,
    *,
    D: Tensor,  # [C]
    z: Tensor | None = None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    **_others: object,
) -> tuple[Tensor, Tensor]:
    """Return [B, C, S] and the state after it [B, C, k], of Mamba-1: a channel is a head.

    Its kernel is not handed the state. Of a layer with some scans each goes on from its own part.
    """
    state = trace.asked if trace.asked.dim() == 3 else trace.asked[:, trace.num_scans]
    trace.num_scans += 1
    dt_BSC = _time_step(dt.transpose(1, 2), delta_bias, delta_softplus)
    inner_BSC, channels = hidden_states.transpose(1, 2), hidden_states.shape[1]
    real_BS1 = trace.real(dt.shape[2])
    out, new_state = _scan(
        _for_heads(C.transpose(1, 2).unsqueeze(2), channels),
        _for_heads(B.transpose(1, 2).unsqueeze(2), channels),
        torch.where(real_BS1, inner_BSC * dt_BSC, 0.0).unsqueeze(-1),
        state=state.unsqueeze(-1),
        decay=(torch.where(real_BS1, dt_BSC, 0.0).unsqueeze(-1) * A).flatten(2),
        scale=1.0,
    )
    out_BCS = (out.squeeze(-1) + inner_BSC * D).transpose(1, 2)
    if z is not None:
        out_BCS = out_BCS * functional.silu(z)
    return out_BCS, new_state.squeeze(-1)


def _time_step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias
    return functional.softplus(dt) if softplus else dt


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
    "mamba2_chunk_scan": _scan_by_head,
    "mamba_selective_scan": _scan_by_channel,
}
