"""Entries of a config that are a number of things; families call the same one differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_count(value: object) -> int:
    """Return a value that is a number of things, 0 for what is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return max(value, 0)


def count(values: Mapping[str, Any], name: str) -> int:
    """Return an entry that is a number of things, 0 where it is none."""
    return as_count(values.get(name))


def first_count(values: Mapping[str, Any], *names: str) -> int:
    """Return the first of these entries that is a number of things, 0 where none is."""
    return next((count(values, name) for name in names if count(values, name)), 0)
