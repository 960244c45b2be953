"""What trackers of experiments receive of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recmas_compiler.trackers.tracker import TrackedRun
from recmas_compiler.trackers.tracking import TrackerChoice, Tracking, tracked_run
from recmas_compiler.training.loop.loop import Sink
from recmas_compiler.training.loop.metrics import read_costs
from recmas_compiler.training.receipt import RunReport
from recmas_compiler.training.session import Session

MakeSink = Callable[[str], Sink]


def tracked_training(
    session: Session, what: str, trackers: tuple[TrackerChoice, ...], *, folder: Path, resume: bool
) -> AbstractContextManager[Tracking]:
    """Tell trackers of the training that the block runs; only the main process does.

    Args:
        what: The stage, or the method in the place of links.
        folder: The run's.
        resume: Go on with the runs that trackers had begun for it.

    Raises:
        RecmasError: As `open_tracking`.
    """
    run = TrackedRun(
        name=f"{session.spec.document.name} {what}", job="train", settings=_settings(session, what)
    )
    chosen = trackers if session.world.is_main else ()
    return tracked_run(chosen, run, folder=folder, resume=resume)


def sinks_beside(tracking: Tracking, other: MakeSink | None) -> MakeSink:
    """Return what gives every stage's metrics to trackers and to another reader."""

    def make(title: str) -> Sink:
        sinks = [tracking.sink(title), *([other(title)] if other is not None else [])]

        def take(entry: Mapping[str, Any]) -> None:
            for sink in sinks:
                sink(entry)

        return take

    return make


def training_results(report: RunReport, folder: Path) -> dict[str, Any]:
    """Return what trackers are told at the end: figures before and after, and costs."""
    costs = {place: asdict(cost) for place, cost in read_costs(folder).items()}
    return {**report.stages, "costs": costs}


def _settings(session: Session, what: str) -> dict[str, Any]:
    examples, system = session.examples, session.system
    return {
        "stage": what,
        "spec": session.spec.document.name,
        "system": session.spec.digest,
        "rounds": system.rounds,
        "latent_steps": {name: agent.latent_steps for name, agent in system.agents.items()},
        "records": {"train": len(examples.train), "held_out": len(examples.held_out)},
        "train": session.settings.section.model_dump(mode="json", exclude_none=True),
        "backbone_dtype": session.dtype,
        "device": session.world.device.type,
        "processes": session.world.size,
    }
