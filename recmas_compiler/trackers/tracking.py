"""Several trackers as one, which never stops the run whose figures it receives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from recmas_compiler.trackers.tracker import (
    Ending,
    Figures,
    TrackedRun,
    Tracker,
    figures_of,
)
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.files import write_whole
from recmas_runtime.core.text import first_line, listed

FOLDER: Final = "trackers"
_IDS: Final = "runs.json"
_URI: Final = "://"

# By name the package, and the class that writes; none is imported before it is asked for.
TRACKERS: Final[Mapping[str, tuple[str, str]]] = {
    "tensorboard": ("tensorboard", "tensorboard_files:TensorBoardFiles"),
    "wandb": ("wandb", "wandb_run:WandbRun"),
    "mlflow": ("mlflow", "mlflow_store:MlflowStore"),
    "trackio": ("trackio", "trackio_tables:TrackioTables"),
}
# Read by packages as they are imported: what they would tell their makers of errors and of use.
_TELEMETRY_OFF: Final = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass(frozen=True, kw_only=True)
class TrackerChoice:
    """A tracker that somebody asked for.

    Attributes:
        place: Where it writes: a folder, for `mlflow` also the address of a server or database;
            None for a folder of the run's own.
    """

    name: str
    place: str | None

    @property
    def package(self) -> str:
        """The package that it needs."""
        return TRACKERS[self.name][0]


def chosen_trackers(given: Sequence[str]) -> tuple[TrackerChoice, ...]:
    """Return the trackers that `NAME` or `NAME=PLACE` name.

    Raises:
        RecmasError: RM506 for one that there is not, or that is named twice; RM201 without its
            package.
    """
    found: dict[str, TrackerChoice] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if name not in TRACKERS or (equals and not place):
            hint = f"Trackers are {listed(TRACKERS)}; NAME=FOLDER says where one writes."
            raise fail("RM506", f"there is no tracker {text!r}", hint=hint)
        if name in found:
            raise fail("RM506", f"the tracker {name} is named twice", hint="Name it once.")
        if _URI in place and name != "mlflow":
            hint = f"Name a folder; `{name}` is never sent anywhere by recmas."
            raise fail("RM506", f"--tracker {text}: {name} writes to a folder", hint=hint)
        choice = TrackerChoice(name=name, place=place or None)
        if find_spec(choice.package) is None:
            raise fail(
                "RM201",
                f"--tracker {name} needs the package {choice.package}, which is not installed",
                hint=f"Install it with `pip install {choice.package}`.",
            )
        found[name] = choice
    return tuple(found.values())


class Tracking:
    """Passes a run's figures on. A tracker that fails receives nothing more; the run goes on.

    Attributes:
        problems: A warning for each that failed.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._results: Mapping[str, Any] = {}
        self._ending: Ending = "failed"
        self.problems: tuple[Problem, ...] = ()

    def log(self, group: str, figures: Figures, *, step: int) -> None:
        """Write figures of a step of a group."""
        self._each(lambda tracker: tracker.log(group, figures, step=step))

    def sink(self, title: str) -> Callable[[Mapping[str, Any]], None]:
        """Return what takes the entries of a training's stage; see `training.loop.metrics`."""
        group = title.replace(" ", "/")

        def take(entry: Mapping[str, Any]) -> None:
            told = {name: each for name, each in entry.items() if name not in ("kind", "step")}
            self.log(f"{group}/{entry['kind']}", figures_of(told), step=entry["step"])

        return take

    def ended(self, results: Mapping[str, Any], *, interrupted: bool) -> None:
        """Take what came out; without it, a run counts as failed."""
        self._results, self._ending = results, "interrupted" if interrupted else "finished"

    def finish(self, *, interrupted: bool = False) -> None:
        """Write what came out, and let go of the trackers."""
        figures = figures_of(self._results)
        ending: Ending = "interrupted" if interrupted else self._ending
        self._each(lambda tracker: tracker.finish(figures, ending=ending))
        self._trackers.clear()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._trackers.items()]:
            try:
                tell(tracker)
            except Exception as error:  # whatever a foreign package meets
                del self._trackers[name]
                self.problems += (_failed(name, error),)


@contextmanager
def tracked_run(
    choices: Sequence[TrackerChoice], run: TrackedRun, *, folder: Path, resume: bool
) -> Iterator[Tracking]:
    """Tell trackers of the run of this block, however that ends; see `open_tracking`."""
    tracking = open_tracking(choices, run, folder=folder, resume=resume)
    interrupted = False
    try:
        yield tracking
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        tracking.finish(interrupted=interrupted)


def open_tracking(
    choices: Sequence[TrackerChoice], run: TrackedRun, *, folder: Path, resume: bool
) -> Tracking:
    """Start trackers for a run whose files are in a folder.

    Args:
        resume: Go on with the runs that trackers had begun for this folder.

    Raises:
        RecmasError: RM201 for a package that cannot be imported, RM503 for a tracker that cannot
            write where it should.
    """
    ids = _read_ids(folder) if resume else {}
    trackers: dict[str, Tracker] = {}
    for choice in choices:
        place = _place(choice, folder)
        before = ids.get(choice.name)
        goes_on = before is not None and before[1] == choice.place
        try:
            tracker = _class(choice)(place)
            run_id = tracker.start(run, run_id=before[0] if before and goes_on else None)
        except ImportError as error:
            raise fail(
                "RM201",
                f"--tracker {choice.name}: the package {choice.package} cannot be imported "
                f"({first_line(error)})",
                hint=f"Install it with `pip install {choice.package}`.",
            ) from error
        except Exception as error:  # whatever a foreign package meets
            raise fail(
                "RM503",
                f"--tracker {choice.name} cannot write to {place}: {first_line(error)}",
                hint=f"Name another place, as {choice.name}=FOLDER, or leave the tracker out.",
            ) from error
        trackers[choice.name] = tracker
        ids[choice.name] = (run_id, choice.place)
    if choices:
        text = {name: {"run": run_id, "place": place} for name, (run_id, place) in ids.items()}
        write_whole(folder / FOLDER / _IDS, json.dumps(text, indent=1) + "\n")
    return Tracking(trackers)


def _class(choice: TrackerChoice) -> Callable[[str | Path], Tracker]:
    os.environ.update(_TELEMETRY_OFF)
    module, _, name = TRACKERS[choice.name][1].partition(":")
    found: Callable[[str | Path], Tracker] = getattr(
        import_module(f"recmas_compiler.trackers.{module}"), name
    )
    return found


def _place(choice: TrackerChoice, folder: Path) -> str | Path:
    if choice.place is None:
        return folder / FOLDER / choice.name
    return choice.place if _URI in choice.place else Path(choice.place)


def _read_ids(folder: Path) -> dict[str, tuple[str, str | None]]:
    """Return the run of each tracker's earlier part, and where it was asked to write.

    None where that cannot be read: new runs are begun.
    """
    try:
        found = json.loads((folder / FOLDER / _IDS).read_bytes())
        return {name: (each["run"], each["place"]) for name, each in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _failed(name: str, error: Exception) -> Problem:
    return Problem(
        code="RM759",
        severity="warning",
        message=f"the tracker {name} failed ({type(error).__name__}: {first_line(error)}) and "
        "receives nothing more",
        hint="The run itself is whole; its own files have every figure.",
    )
