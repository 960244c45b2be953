"""Up to which length a model's rotary embeddings are the same for every sequence.

`longrope` and `dynamic` choose frequencies by the length of the input. Rows that are in a cache
were rotated with those of their time, so a sequence that grows past the border would be another
one than a model computes at once. Up to the border the frequencies are fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

# "su" is what early Phi-3 calls it.
_BY_LENGTH: Final = ("longrope", "su", "dynamic")


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
