"""The states of layers that keep one, told from the entries of a config.

As with keys and values, the rules go by how families name sizes, in whichever a config has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recmas_runtime.formats.layers import StateShape


def state_shapes(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return the states of a layer of kind `linear`; none where no rule knows the entries."""
    for rule in (_delta_net,):
        found = rule(values)
        if found:
            return found
    return ()


def _delta_net(values: Mapping[str, Any]) -> tuple[StateShape, ...]:
    """Return those of gated DeltaNet: queries, keys and values go through one convolution."""
    heads = count(values, "linear_num_value_heads")
    key_width = count(values, "linear_key_head_dim")
    width = count(values, "linear_value_head_dim")
    keys = count(values, "linear_num_key_heads") * key_width
    return _shapes(
        channels=2 * keys + heads * width,
        taps=count(values, "linear_conv_kernel_dim"),
        recurrent=(heads, key_width, width),
    )


def _shapes(*, channels: int, taps: int, recurrent: tuple[int, ...] = ()) -> tuple[StateShape, ...]:
    """Return the states of a layer, none if a size is missing."""
    if channels < 1 or taps < 2 or 0 in recurrent:
        return ()
    # What the next position sees of those before.
    conv = StateShape(name="conv", shape=(channels, taps - 1))
    return (conv, StateShape(name="recurrent", shape=recurrent)) if recurrent else (conv,)


def count(values: Mapping[str, Any], name: str) -> int:
    """Return an entry that is a number of things, 0 where it is none."""
    found = values.get(name)
    if not isinstance(found, int) or isinstance(found, bool):
        return 0
    return max(found, 0)
