"""TensorBoard: event files in a folder."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from recmas_compiler.trackers.tracker import Ending, Figures, TrackedRun

# How long a figure may wait in memory.
_FLUSH_S = 10


class TensorBoardFiles:
    """Writes event files; those of a run that goes on lie beside the first ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, run: TrackedRun, *, run_id: str | None) -> str:
        """Open a new file of events."""
        self._writer = SummaryWriter(str(self._folder), flush_secs=_FLUSH_S)
        if run_id is None:
            text = json.dumps(run.settings, indent=1, default=str)
            indented = text.replace("\n", "\n    ")
            self._writer.add_text("settings", f"    {indented}")
        return run_id or str(self._folder)

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write scalars."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def finish(self, results: Figures, *, ending: Ending) -> None:
        """Write results as scalars of step 0, and close the file."""
        for name, value in results.items():
            self._writer.add_scalar(f"results/{name}", value, 0)
        self._writer.add_text("ending", ending)
        self._writer.close()
