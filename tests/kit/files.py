"""Files that tests write and read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from recmas_runtime.running.run_trace import RECORDS_NAME

# The type of the fixture `write_records`.
WriteRecords = Callable[[Sequence[Mapping[str, object]]], Path]

# A protocol that asks for exact words, in a few tokens.
WORDS_PROTOCOL = """
name: words
version: 1
description: Exact words.
data: {source: nowhere, split: test, fields: {question: [question]}, gold: {answer: [answer]}}
max_new_tokens: 4
check: {kind: exact}
"""


class MadeOnce:
    """Folders that are made once per test run, whichever of its processes asks first."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        base = factory.getbasetemp()
        # A process of pytest-xdist has a folder of its own in the folder of the run.
        self._root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
        self._root.mkdir(exist_ok=True)

    def __call__(self, key: str, make: Callable[[Path], object]) -> Path:
        """Return the folder of `key`, not to be changed; `make` writes it if it is not there."""
        folder = self._root / hashlib.sha256(key.encode()).hexdigest()[:16]
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                half = folder.with_suffix(".half")
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir()
                make(half)
                half.rename(folder)
        return folder


def lines(*records: object) -> str:
    """Return records as JSON lines; texts are lines already."""
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records)


def read_messages(folder: Path) -> dict[str, np.ndarray]:
    """Return a trace's messages [records, m, d] by link and round, filled up with NaN."""
    lines = (folder / RECORDS_NAME).read_text(encoding="utf-8").splitlines()
    records = []
    for name in sorted(json.loads(line)["file"] for line in lines):
        with np.load(folder / name, allow_pickle=False) as arrays:
            records.append(dict(arrays))
    found = {}
    for name in dict.fromkeys(name for record in records for name in record):
        widths = {record[name].shape[1] for record in records if name in record}
        most = max(len(record[name]) for record in records if name in record)
        found[name] = np.full((len(records), most, *widths), np.nan, np.float32)
        for row, record in enumerate(records):
            message = record.get(name, ())
            found[name][row, : len(message)] = message if len(message) else np.nan
    return found
