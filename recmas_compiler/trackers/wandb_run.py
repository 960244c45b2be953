"""Weights & Biases, offline: `wandb sync` uploads the folder when the user wants that."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import wandb

from recmas_compiler.trackers.tracker import PROJECT, Ending, Figures, TrackedRun


class WandbRun:
    """Writes an offline run; one that goes on has the same id, in another folder beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: set[str] = set()
        self._step = 0

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        """Open the run's file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        run_id = run_id or f"{int(time.time()):x}-{uuid.uuid4().hex[:8]}"
        self._began = int(run_id.partition("-")[0], 16)
        self._run: Any = wandb.init(
            project=PROJECT,
            name=run.name,
            job_type=run.job,
            id=run_id,
            dir=str(self._folder),
            config=dict(run.settings),
            reinit="create_new",  # a run of the caller's own goes on
            settings=wandb.Settings(
                mode="offline",
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                # What it would find out of the machine asks an address of cloud providers.
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        return run_id

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write figures over the group's own steps.

        wandb's own count must rise through all groups and all parts of a run, so it is time.
        """
        at = f"{group}/at"
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(at, hidden=True)
            self._run.define_metric(f"{group}/*", step_metric=at)
        told = {f"{group}/{name}": value for name, value in figures.items()}
        self._step = max(self._step + 1, int((time.time() - self._began) * 100))
        self._run.log({at: step, **told}, step=self._step)

    def finish(self, results: Figures, *, ending: Ending) -> None:
        """Write results into the summary."""
        told = {f"results/{name}": value for name, value in results.items()}
        self._run.summary.update({**told, "ending": ending})
        self._run.finish(exit_code=1 if ending == "failed" else 0)
