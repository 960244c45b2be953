"""The states of layers that keep one, told from the entries of a config.

As with keys and values, the rules go by how families name sizes, in whichever a config has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recmas_compiler.backbones.config.entries import count, first_count
from recmas_runtime.formats.layers import StateShape


def state_shapes(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return the states of a layer that keeps some; none where no rule knows the entries."""
    for rule in (_delta_net, _kimi_delta_net, _scan_by_head, _scan, _convolution):
        found = rule(values)
        if found:
            return found
    return ()


def _delta_net(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return those of gated DeltaNet: queries, keys and values go through one convolution."""
    if "linear_allow_neg_eigval" in values:  # what its family's class makes of what is left out
        heads = count(values, "num_attention_heads")
        key_heads = count(values, "linear_num_key_heads") or heads
        key_width = int(0.75 * count(values, "hidden_size") / max(key_heads, 1))
        key_width = count(values, "linear_key_head_dim") or key_width
        values = {
            **values,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": count(values, "linear_num_value_heads") or heads,
            "linear_key_head_dim": key_width,
            "linear_value_head_dim": count(values, "linear_value_head_dim") or 2 * key_width,
        }
    heads = count(values, "linear_num_value_heads")
    key_width = count(values, "linear_key_head_dim")
    width = count(values, "linear_value_head_dim")
    keys = count(values, "linear_num_key_heads") * key_width
    return _shapes(
        channels=2 * keys + heads * width,
        taps=count(values, "linear_conv_kernel_dim"),
        recurrent=(heads, key_width, width),
    )


def _kimi_delta_net(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return those of Kimi's delta attention: all heads of queries, keys, values are alike."""
    own = values.get("linear_attn_config")
    if isinstance(own, dict):
        heads, width = count(own, "num_heads"), count(own, "head_dim")
        taps = count(own, "short_conv_kernel_size")
    else:
        heads, width = count(values, "linear_num_heads"), count(values, "linear_head_dim")
        taps = first_count(values, "linear_conv_kernel_dim", "short_conv_kernel_size")
    if "short_conv_kernel_size" in values:  # with the heads of its attention, unless it says so
        heads = heads or count(values, "num_attention_heads")
        width = width or count(values, "head_dim")
    return _shapes(channels=3 * heads * width, taps=taps, recurrent=(heads, width, width))


def _scan_by_head(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return those of Mamba-2, whose heads each have one decay."""
    heads = first_count(values, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    inner = count(values, "mamba_d_ssm") or _inner(values)
    width = inner // heads if heads else 0
    if "mamba_num_heads" in values:
        width = count(values, "mamba_head_dim")
    if "num_heads" in values:
        width = count(values, "head_dim")
    groups = first_count(values, "mamba_n_groups", "n_groups", "mamba_ngroups")
    state = _state_width(values)
    return _shapes(
        channels=heads * width + 2 * groups * state if groups else 0,
        taps=_taps(values),
        recurrent=(heads, state, width),
    )


def _scan(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return those of Mamba-1, in which every channel is a head, also where there are some more."""
    inner, heads = _inner(values), count(values, "n_mamba_heads")
    channels = (heads, inner // heads) if heads else (inner,)
    recurrent = (*channels, _state_width(values))
    return _shapes(channels=inner, taps=_taps(values), recurrent=recurrent)


def _convolution(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return the state of a convolution alone."""
    return _shapes(channels=count(values, "hidden_size"), taps=count(values, "conv_L_cache"))


def _inner(values: Mapping[str, Any]) -> int:
    return first_count(values, "mamba_expand", "expand") * count(values, "hidden_size")


def _state_width(values: Mapping[str, Any]) -> int:
    return first_count(values, "mamba_d_state", "ssm_state_size", "state_size")


def _taps(values: Mapping[str, Any]) -> int:
    return first_count(values, "mamba_d_conv", "conv_kernel")


def _shapes(*, channels: int, taps: int, recurrent: tuple[int, ...] = ()) -> tuple[StateShape, ...]:
    """Return the states of a layer, none if a size is missing."""
    if channels < 1 or taps < 2 or 0 in recurrent:
        return ()
    # What the next position sees of those before.
    conv = StateShape(name="conv", shape=(channels, taps - 1))
    return (conv, StateShape(name="recurrent", shape=recurrent)) if recurrent else (conv,)
