"""The stages of a run, one after the other, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from recmas_compiler.lowering.materialize import MaterializedLink
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.train import TrainSection
from recmas_compiler.training.data.hidden_state_cache import Thoughts, ThoughtsPart, thoughts_of
from recmas_compiler.training.loop.run_loop import RunOptions, figures_of, run_loop
from recmas_compiler.training.receipt import TrainedLink, make_receipt, write_links
from recmas_compiler.training.session import Session
from recmas_compiler.training.task import LoopResult
from recmas_compiler.training.tasks.inner import InnerTask, inner_baselines
from recmas_compiler.training.tasks.outer import OuterTask
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.ids import (
    canonical_link_name,
    inner_link_id,
    link_ends,
    link_file_name,
    outer_link_id,
)

Stage = Literal["inner", "outer", "all"]

LINKS: Final = "links"
HIDDEN: Final = "hidden"


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        stages: Figures by stage.
        starts: By link id: where its weights came from before the last stage.
        trained: Ids of the links that learned, in this folder's earlier runs too.
        interrupted: Whether somebody stopped it.
    """

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    starts: dict[str, str] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    interrupted: bool = False


def run_stages(session: Session, stage: Stage, options: RunOptions) -> RunReport:
    """Train, and write the links that a finished stage gives: to `links_dir` after the last one.

    The outer stage starts from the links of an inner stage in the same folder.

    Raises:
        RecmasError: As `Loop.run`; RM303 if links cannot be written, RM704 if there are more
            processes than records in a batch, RM705 if a stage has nothing to learn.
    """
    report = RunReport()
    check_processes(session.settings.section, stage, session.world.size)
    _check_learning(session, stage)
    if stage in ("inner", "all"):
        _inner_stage(session, options, report, is_last=stage == "inner")
    if stage in ("outer", "all") and not report.interrupted:
        _outer_stage(session, options, report)
    return report


def check_processes(section: TrainSection, stage: Stage, num_processes: int) -> None:
    """Make sure that every process has a record of every batch.

    Raises:
        RecmasError: RM704.
    """
    sizes = {"inner": section.inner.batch_size, "outer": section.outer.batch_size}
    for name, batch_size in sizes.items():
        if stage in (name, "all") and batch_size < num_processes:
            raise fail(
                "RM704",
                f"{num_processes} processes cannot share batches of {batch_size} records",
                hint=f"Start fewer processes, or raise `train.{name}.batch_size`.",
            )


def _check_learning(session: Session, stage: Stage) -> None:
    """Make sure that there is something to learn, before anything that takes long.

    Raises:
        RecmasError: RM705.
    """
    reached = session.graph.schedule.links
    hint = "Take a link out of `train.outer.freeze`, or raise `latent_steps` or `rounds`."
    setting: tuple[str, ...] = ("outer", "freeze")
    if stage == "inner" and not session.thinkers:
        why, setting = "no agent that thinks has a target", ("targets",)
        hint = "Give an agent `latent_steps` above 0 and a field in `train.targets`."
    elif stage != "inner" and not reached:
        why = "no message is on its way to the answer"
    elif stage != "inner" and reached.isdisjoint(_learning(session)):
        why = "all links that the answer depends on are frozen"
    else:
        return
    message = f"the {'inner' if stage == 'inner' else 'outer'} stage has nothing to learn: {why}."
    place = session.spec.position("train", *setting)
    raise RecmasError(problem_at(place, "RM705", message, hint=hint))


def _inner_stage(
    session: Session, options: RunOptions, report: RunReport, *, is_last: bool
) -> None:
    thoughts = {agent: _thoughts(session, agent, options.folder) for agent in session.thinkers}
    links = session.start(thoughts={agent: known for agent, (known, _) in thoughts.items()})
    _note_starts(report, links)
    figures: dict[str, Any] = {}
    report.stages["inner"] = figures
    for agent in session.thinkers:
        start = links[inner_link_id(agent)]
        result, levels = _train_agent(session, agent, options, *thoughts[agent], start=start)
        figures[agent] = {**figures_of(result), "baselines": levels}
        if result.interrupted:
            report.interrupted = True
            return
    report.trained = tuple(inner_link_id(agent) for agent in session.thinkers)
    kept = {link_id: links[link_id] for link_id in report.trained}
    _keep(session, kept, report, folders=(options.folder / "inner" / LINKS,))
    if is_last:  # else an outer stage that fails would leave half a training in the place of links
        _keep(session, links, report, folders=(session.settings.links_dir,))


def _thoughts(session: Session, agent: str, folder: Path) -> tuple[Thoughts, Thoughts]:
    """Return an agent's thoughts over the training records, and over the held-out ones."""
    settings = session.settings.section
    train = session.target_calls(agent, session.examples.train)
    held_out = session.target_calls(agent, session.examples.held_out[: settings.eval_records])
    thoughts = thoughts_of(
        session.backbone(agent),
        [*train, *held_out],
        folder=folder / HIDDEN,
        max_bytes=settings.cache_mb * 2**20 // len(session.thinkers),
        world=session.world,
        progress=session.progress,
    )
    return (
        ThoughtsPart(thoughts, first=0, count=len(train)),
        ThoughtsPart(thoughts, first=len(train), count=len(held_out)),
    )


def _train_agent(
    session: Session,
    agent: str,
    options: RunOptions,
    train: Thoughts,
    held_out: Thoughts,
    *,
    start: MaterializedLink,
) -> tuple[LoopResult, dict[str, float]]:
    settings, world, backbone = session.settings.section, session.world, session.backbone(agent)
    levels: dict[str, float] = {}
    if len(held_out):
        levels = inner_baselines(
            agent,
            start.weights.kind,
            backbone,
            train=train,
            held_out=held_out,
            aligned=start.module if start.init == "aligned" else None,
            world=world,
        )
    link_id = inner_link_id(agent)
    task = InnerTask(
        agent,
        session.graph.link(link_id),
        backbone,
        train=train,
        held_out=held_out if len(held_out) else None,
        mse_weight=settings.inner.mse_weight,
    )
    folder = options.folder / "inner" / agent
    title = f"inner {agent}"
    result = run_loop(session, task, settings.inner, folder, options, title=title, levels=levels)
    return result, levels


def _outer_stage(session: Session, options: RunOptions, report: RunReport) -> None:
    settings = session.settings.section
    inner = options.folder / "inner" / LINKS
    links = session.start(trained=inner if inner.is_dir() else None)
    _note_starts(report, links)
    learned = tuple(i for i in links if (inner / link_file_name(i)).is_file())
    learning = {link_id: session.graph.link(link_id) for link_id in _learning(session)}
    for link_id in links:
        session.graph.link(link_id).requires_grad_(link_id in learning)
    task = OuterTask(
        session.graph,
        learning,
        train=session.examples.train,
        held_out=session.examples.held_out[: settings.eval_records],
        batch_size=settings.outer.batch_size,
    )
    folder = options.folder / "outer"
    result = run_loop(session, task, settings.outer, folder, options, title="outer")
    report.stages["outer"] = figures_of(result)
    report.interrupted = result.interrupted
    if not result.interrupted:
        report.trained = tuple(dict.fromkeys((*learned, *learning)))
        _keep(session, links, report, folders=(folder / LINKS, session.settings.links_dir))


def _learning(session: Session) -> tuple[str, ...]:
    """Return the links that learn in the outer stage."""
    outer, system = session.settings.section.outer, session.system
    frozen = {_link_id(name) for name in outer.freeze}
    inner = () if outer.freeze_inner else map(inner_link_id, system.agents)
    return tuple(link_id for link_id in (*inner, *system.links) if link_id not in frozen)


def _link_id(name: str) -> str:
    """Return the id of what `train.outer.freeze` names: a link, or an agent for its inner link."""
    link = canonical_link_name(name)
    return inner_link_id(name) if link is None else outer_link_id(*link_ends(link))


def _keep(
    session: Session,
    links: Mapping[str, MaterializedLink],
    report: RunReport,
    *,
    folders: Sequence[Path],
) -> None:
    if session.world.is_main:
        receipt = make_receipt(
            session.spec,
            session.settings,
            session.examples,
            stages=report.stages,
            num_processes=session.world.size,
            device=session.world.device.type,
        )
        kept = {
            link_id: TrainedLink(
                module=session.graph.link(link_id),
                source=link.source,
                target=link.target,
                start=report.starts[link_id],
                trained=link_id in report.trained,
            )
            for link_id, link in links.items()
        }
        for folder in folders:
            write_links(folder, kept, receipt)
    session.world.wait()


def _note_starts(report: RunReport, links: Mapping[str, MaterializedLink]) -> None:
    for link_id, link in links.items():
        report.starts.setdefault(link_id, link.init)
