"""The type of the fixture `write_records`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

WriteRecords = Callable[[Sequence[Mapping[str, object]]], Path]
