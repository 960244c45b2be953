"""Offline files of Weights & Biases, which the package itself reads only to upload them.

They are a log of LevelDB's form behind seven bytes of its own, of one protobuf record a piece.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_BLOCK: Final = 2**15
_HEAD: Final = struct.Struct("<IHB")  # checksum, length, kind
_ENDS: Final = (1, 4)  # kinds of pieces that end a record: whole, last


@dataclass
class WandbRun:
    """A run as its file has it."""

    id: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def read_wandb_run(path: Path) -> WandbRun:
    """Return what a `run-ID.wandb` holds."""
    run = WandbRun()
    for record in _records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.name = record.run.run_id, record.run.display_name
                run.config |= _items(record.run.config.update)
            case "history":
                run.history.append(_items(record.history.item))
            case "summary":
                run.summary |= _items(record.summary.update)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _items(found: Any) -> dict[str, Any]:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in found}


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + _HEAD.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD.size:
            at += left
            continue
        _, length, kind = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        whole += data[at : at + length]
        at += length
        if kind in _ENDS:
            yield Record.FromString(whole)
            whole = b""
