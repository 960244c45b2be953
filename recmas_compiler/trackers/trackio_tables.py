"""Trackio: its SQLite database in a folder.

Written through the class that trackio itself writes with. Its `init` would ask huggingface.co for
the user's name also where it logs locally, print on standard output, and keep errors to itself.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from trackio import sqlite_storage

from recmas_compiler.trackers.tracker import PROJECT, Ending, Figures, TrackedRun

# How long figures may wait in memory: a write takes longer than steps of small models.
_FLUSH_S: Final = 2.0


class TrackioTables:
    """Writes a run into the project's database; a run that goes on keeps its id."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._waiting: list[tuple[dict[str, Any], int, str]] = []
        self._written_at = 0.0
        self._config: dict[str, Any] | None = None

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        """Make the database."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._id = run_id or uuid.uuid4().hex
        self._name = run.name
        settings = json.loads(json.dumps(run.settings, default=str))
        self._config = {**settings, "job": run.job, "_Created": _now()}
        with self._storage() as storage:
            storage.init_db(PROJECT)
        return self._id

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write metrics, or keep them for a moment."""
        told: dict[str, Any] = {f"{group}/{name}": value for name, value in figures.items()}
        self._waiting.append((told, step, _now()))
        if time.monotonic() - self._written_at > _FLUSH_S:
            self._flush()

    def finish(self, results: Figures, *, ending: Ending) -> None:
        """Write what waits, and the results as metrics of step 0."""
        told = {f"results/{name}": value for name, value in results.items()}
        self._waiting.append(({**told, "ending": ending}, 0, _now()))
        self._flush()

    def _flush(self) -> None:
        metrics, steps, timestamps = zip(*self._waiting, strict=True)
        with self._storage() as storage:
            storage.bulk_log(
                PROJECT,
                self._name,
                list(metrics),
                steps=list(steps),
                timestamps=list(timestamps),
                config=self._config,
                run_id=self._id,
            )
        self._config = None
        self._waiting.clear()
        self._written_at = time.monotonic()

    @contextmanager
    def _storage(self) -> Iterator[Any]:
        """Give the storage with this folder as its own; what the caller does with it goes on."""
        before = sqlite_storage.TRACKIO_DIR
        sqlite_storage.TRACKIO_DIR = self._folder
        try:
            yield sqlite_storage.SQLiteStorage
        finally:
            sqlite_storage.TRACKIO_DIR = before


def _now() -> str:
    return datetime.now(UTC).isoformat()
