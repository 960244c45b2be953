"""One loop of a run with all that it leaves in its folder: metrics, curves, costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from recmas_compiler.backbones.torch_model import weights_digest
from recmas_compiler.spec.schema.section import Section
from recmas_compiler.spec.schema.train import InnerStageSection, OuterStageSection
from recmas_compiler.training.loop.checkpoint import unwritable
from recmas_compiler.training.loop.cost import write_cost
from recmas_compiler.training.loop.curves import draw_curves
from recmas_compiler.training.loop.loop import Loop
from recmas_compiler.training.loop.progress import watching
from recmas_compiler.training.session import Session
from recmas_compiler.training.task import LoopResult, LoopSettings, Sink, Task

BASELINES: Final = "baselines.json"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is started.

    Attributes:
        folder: Where metrics, checkpoints and curves go, by stage.
        resume: Go on from the last checkpoints.
        quiet: Show no progress.
        make_sink: Gives a stage's metrics another reader.
    """

    folder: Path
    resume: bool
    quiet: bool
    make_sink: Callable[[str], Sink] | None = None


def run_loop(
    session: Session,
    task: Task,
    stage: InnerStageSection | OuterStageSection,
    folder: Path,
    options: RunOptions,
    *,
    title: str,
    levels: Mapping[str, float] | None = None,
    own: tuple[Section, ...] = (),
) -> LoopResult:
    """Train a task to its end, or until somebody interrupts.

    Args:
        session: What the task was made from.
        task: What learns.
        stage: Steps, rate and batch size.
        folder: Where everything goes.
        options: How the run was started.
        title: Names the loop in progress and pictures.
        levels: Held-out figures to compare with, by name.
        own: Further settings that the result depends on.

    Raises:
        RecmasError: As `Loop.run`.
    """
    settings, world = LoopSettings.of(session.settings.section, stage), session.world
    sinks: tuple[Sink, ...] = ()
    if options.make_sink is not None and world.is_main:
        sinks = (options.make_sink(title),)
    loop = Loop(
        task,
        settings,
        folder=folder,
        identity=_identity(session, task.links, stage, *own),
        world=world,
        sinks=sinks,
    )
    quiet = options.quiet or not world.is_main
    with watching(title, settings.steps, quiet=quiet) as watch:
        result = loop.run(resume=options.resume, watch=watch)
    if world.is_main:
        try:
            write_cost(folder, task.links, world)
            if levels:
                text = json.dumps(dict(levels), indent=1)
                (folder / BASELINES).write_text(text + "\n", encoding="utf-8")
            draw_curves(folder, title=f"{session.system.name}: {title}", levels=levels)
        except OSError as error:
            raise unwritable(folder, error) from error
    return result


def figures_of(result: LoopResult) -> dict[str, Any]:
    """Return what a report says about a loop."""
    return {
        "steps": result.steps,
        "loss": result.loss,
        "before": dict(result.first),
        "after": dict(result.last),
    }


def _identity(session: Session, links: Mapping[str, nn.Module], *own: Section) -> dict[str, str]:
    """Return what a run is made of, for a checkpoint to refuse another one."""
    starts = "".join(f"{link_id} {weights_digest(link)}\n" for link_id, link in links.items())
    return {
        "the system": session.spec.digest,
        "the data": " ".join(session.examples.digests.values()),
        "the settings": session.settings.digest(*own),
        "the links at the start": hashlib.sha256(starts.encode()).hexdigest(),
    }
