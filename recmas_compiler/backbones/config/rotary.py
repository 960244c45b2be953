"""What a config tells of positions: how long they are fixed, and whether rows can be moved.

`longrope` and `dynamic` choose frequencies by the length of the input. Rows that are in a cache
were rotated with those of their time, so a sequence that grows past the border would be another
one than a model computes at once. Up to the border the frequencies are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_ADDED: Final = "adds positions to its input vectors"
_NORMED: Final = "norms its keys after turning them for their position"

# Families whose cached rows no rotation leads to another position. A build finds that out for every
# model; these are known before.
_ROWS_STAY: Final[Mapping[str, str]] = {
    **dict.fromkeys(("biogpt", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "opt", "xglm"), _ADDED),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), _NORMED),
}

ROWS_STAY_HINT: Final = (
    "Hand over rows of `context` alone, from one agent that takes none itself, or let the links "
    "carry `context`, `written` or `text`."
)

# "su" is what early Phi-3 calls it.
_BY_LENGTH: Final = ("longrope", "su", "dynamic")


def why_rows_stay(model_type: str) -> str | None:
    """Return what keeps rows of a family's cache from being moved; None where nothing is known."""
    return _ROWS_STAY.get(model_type)


def longest_fixed(values: Mapping[str, Any]) -> int | None:
    """Return the positions up to which frequencies are fixed; None where they always are.

    Args:
        values: The entries of a config, with what its family fills in.
    """
    borders = [border for table in _tables(values) if (border := _border(table, values))]
    return min(borders, default=None)


def _tables(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in ("rope_parameters", "rope_scaling"):
        found = values.get(entry)
        if isinstance(found, dict):
            # some models have one per type of layer
            yield from (found, *(part for part in found.values() if isinstance(part, dict)))


def _border(table: Mapping[str, Any], values: Mapping[str, Any]) -> int | None:
    kind = table.get("rope_type", table.get("type"))
    if kind not in _BY_LENGTH:
        return None
    name = "original_max_position_embeddings"
    usual = values.get("max_position_embeddings")
    # That of a dynamic one is its longest sequence, whatever was its first.
    border = usual if kind == "dynamic" else values.get(name, table.get(name, usual))
    return border if isinstance(border, int) and border > 0 else None
