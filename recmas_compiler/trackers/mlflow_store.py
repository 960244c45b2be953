"""MLflow: a database in a folder, or the server that the user names."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from recmas_compiler.trackers.tracker import (
    PROJECT,
    Ending,
    Figures,
    TrackedRun,
    settings_of,
)

T = TypeVar("T")

_DATABASE: Final = "mlflow.db"
# They say on stderr what tables they make.
_TALKATIVE: Final = ("alembic", "mlflow.store.db.utils")
_STATUS: Final[Mapping[Ending, str]] = {
    "finished": "FINISHED",
    "interrupted": "KILLED",
    "failed": "FAILED",
}
# What one call may hold, and how long a setting may be.
_MOST_METRICS: Final = 1000
_MOST_PARAMS: Final = 100
_MOST_CHARS: Final = 6000


class MlflowStore:
    """Writes a run into an experiment of the project's name."""

    def __init__(self, place: str | Path) -> None:
        self._place = place

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        """Begin a run, or set the one that goes on running again."""
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = client = MlflowClient(tracking_uri=self._uri())
        if run_id is None:
            self._run_id = client.create_run(
                self._experiment(), run_name=run.name, tags={"recmas.job": run.job}
            ).info.run_id
            params = [
                Param(_named(name), _short(value))
                for name, value in settings_of(run.settings).items()
            ]
            for part in _parts(params, _MOST_PARAMS):
                client.log_batch(self._run_id, params=part)
        else:
            self._run_id = run_id
            client.update_run(run_id, status="RUNNING")
        return str(self._run_id)

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write metrics."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(_named(f"{group}/{name}"), value, now, step) for name, value in figures.items()
        ]
        for part in _parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=part)

    def finish(self, results: Figures, *, ending: Ending) -> None:
        """Write results as metrics of step 0, and end the run."""
        self.log("results", results, step=0)
        self._client.set_terminated(self._run_id, status=_STATUS[ending])

    def _uri(self) -> str:
        if isinstance(self._place, str):
            return self._place
        self._place.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{self._place.resolve() / _DATABASE}"

    def _experiment(self) -> Any:
        found = self._client.get_experiment_by_name(PROJECT)
        if found is not None:
            return found.experiment_id
        folder = None if isinstance(self._place, str) else self._place.resolve() / "artifacts"
        return self._client.create_experiment(
            PROJECT, artifact_location=None if folder is None else folder.as_uri()
        )


def _named(name: str) -> str:
    """Return a name that MLflow takes: links `a->b` and their rounds `@2` have none of its own."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("->", " to ").replace("@", " round "))


def _short(text: str) -> str:
    """Return a setting as long as MLflow takes it; what is left out is said."""
    told = f" ... ({len(text)} characters)"
    return text if len(text) <= _MOST_CHARS else text[: _MOST_CHARS - len(told)] + told


def _parts(items: Sequence[T], most: int) -> Iterator[list[T]]:
    left = iter(items)
    while part := list(islice(left, most)):
        yield part
