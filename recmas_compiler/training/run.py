"""The stages of a run, one after the other, and what they leave behind: links and their receipt."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.text_links import text_system, writing_agents
from recmas_compiler.links.link_set import RECEIPT_NAME, finish_replacing
from recmas_compiler.links.trained import ReceiptError, read_receipt
from recmas_compiler.lowering.materialize import MaterializedLink
from recmas_compiler.lowering.training_graph.calls import CallWriter, TrainExample
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import Section
from recmas_compiler.spec.schema.train import (
    BIAS_HINT,
    LINK_GROUPS,
    MethodName,
    OuterStageSection,
    Stage,
    no_bias,
)
from recmas_compiler.spec.spec import Spec
from recmas_compiler.trackers.tracking import TrackerChoice
from recmas_compiler.training.data.examples import Examples, leave_out_long
from recmas_compiler.training.data.hidden_state_cache import HiddenStates, cached_hidden_states
from recmas_compiler.training.loop.checkpoint import writing
from recmas_compiler.training.loop.checkpoint_head import newest_head
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.loop.loop import Loop, LoopResult, Sink, StageSection, Task
from recmas_compiler.training.loop.memory import memory_named
from recmas_compiler.training.loop.metrics import (
    COST_NAME,
    METRICS_NAME,
    MetricsError,
    draw_curves,
    write_cost,
)
from recmas_compiler.training.preflight import (
    HIDDEN_STATES,
    OUTER,
    check_processes,
    inner_place,
    run_identity,
)
from recmas_compiler.training.receipt import RunReport, keep_links
from recmas_compiler.training.session import Session, open_session
from recmas_compiler.training.settings import TrainSettings
from recmas_compiler.training.starts import started
from recmas_compiler.training.tasks.additions import Additions
from recmas_compiler.training.tasks.finetuning import (
    METHODS,
    SingleAgentTask,
    TextSystemTask,
    calls_without_slots,
)
from recmas_compiler.training.tasks.inner import InnerTask, inner_baselines
from recmas_compiler.training.tasks.outer import OuterTask
from recmas_compiler.training.tracked import sinks_beside, tracked_training, training_results
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import sha256_of, write_whole
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.text import first_line
from recmas_runtime.formats.ids import (
    canonical_link_name,
    inner_link_id,
    is_inner,
    link_ends,
    link_file_name,
    outer_link_id,
)
from recmas_runtime.formats.link_kinds import FORMS, LinkKind

LINKS: Final = "links"
BASELINES: Final = "baselines.json"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is started.

    Attributes:
        folder: Where metrics, checkpoints and curves go, by stage.
        make_sink: Gives a stage's metrics another reader.
        trackers: Receive figures, settings and results.
    """

    folder: Path
    resume: bool
    make_sink: Callable[[str], Sink] | None = None
    trackers: tuple[TrackerChoice, ...] = ()


def train_program(
    spec: Spec,
    program: Graph,
    settings: TrainSettings,
    examples: Examples,
    options: RunOptions,
    *,
    stage: Stage,
    method: MethodName | None = None,
    progress: Progress,
) -> tuple[Session, RunReport]:
    """Make a session and run it: the links' stages, or a method in their place.

    Args:
        examples: Those that `prepared_run` gave.

    Raises:
        RecmasError: As `run_stages`, `run_method` and `open_tracking`; RM702 if memory does not
            suffice.
    """
    with joined_world() as world, memory_named(lambda: "outside of the steps"):
        session = open_session(
            spec,
            program,
            settings,
            world=world,
            progress=progress,
            # Steps of usual length are lost in the rounding of bfloat16 weights.
            weights="float32" if method in ("sft", "text") else None,
            examples=examples,
            kept_dtype=_kept_dtype(options) if options.resume else None,
        )
        with tracked_training(
            session,
            method or stage,
            options.trackers,
            folder=options.folder,
            resume=options.resume,
        ) as tracking:
            watched = replace(options, make_sink=sinks_beside(tracking, options.make_sink))
            if method is not None:
                report = run_method(session, method, watched)
            else:
                report = run_stages(session, stage, watched)
            tracking.ended(training_results(report, options.folder), interrupted=report.interrupted)
    found = session.spec.warnings + session.examples.warnings + report.warnings
    report.warnings = found + tracking.problems
    return session, report


def _kept_dtype(options: RunOptions) -> str | None:
    """Return the element type that the run began with, if it got as far as a checkpoint."""
    heads = [newest_head(path) for path in sorted(options.folder.glob("**/checkpoints"))]
    found = [newest[1].machine.get("dtype") for newest in heads if newest is not None]
    return next((dtype for dtype in found if dtype is not None), None)


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


def run_method(session: Session, method: MethodName, options: RunOptions) -> RunReport:
    """Train the answer agent's backbone in the place of links, which stay as they are.

    Steps, batches, their order and the records are those of the outer stage.

    Args:
        session: Its answer agent's backbone is changed; the other backbones are freed.
        options: How the run is started; results are in its folder's `lora`, `sft` or `text`.

    Raises:
        RecmasError: As `Loop.run`; RM201 without peft, RM303 if results cannot be written, RM704 if
            there are more processes than records in a batch.
    """
    agent, section, world = session.system.answer_agent, session.settings.section, session.world
    check_processes(section, "outer", world.size)
    backbone = session.backbone(agent)
    _free_others(session, backbone)
    learner = METHODS[method](backbone, section)
    task = method_task(session, method, {f"{agent}.{method}": learner.weights})
    stage = section.outer.model_copy(update={"lr": learner.settings.lr})
    report = RunReport()
    result = _run_loop(session, task, stage, options, report, place=method, own=(learner.settings,))
    if not result.interrupted and world.is_main:
        with writing(options.folder / method):
            learner.save(options.folder / method)
    world.wait()
    report.stages[method], report.interrupted = result.figures, result.interrupted
    return report


def method_task(
    session: Session, method: MethodName | None, learning: Mapping[str, nn.Module]
) -> SingleAgentTask:
    """Return the task of a method: the answer agent alone, or for `text` all agents.

    Args:
        learning: What learns, by name.

    Raises:
        RecmasError: RM700 if all records of a text system are too long.
    """
    agent, section, system = session.system.answer_agent, session.settings.section, session.system
    examples, make = session.examples, SingleAgentTask
    writer = calls_without_slots(system, session.backbones, agent)
    if method == "text":
        make = TextSystemTask
        texts = writer = CallWriter(text_system(system), session.backbones)

        def lengths(example: TrainExample) -> dict[tuple[str, int], int]:
            return {
                (name, round_): call.num_positions({})
                for name in writing_agents(system)
                for round_, call in enumerate(texts.write_given(name, example), start=1)
            }

        examples = leave_out_long(
            examples, lengths, max_length=section.max_length, progress=session.progress
        )
    return make(
        writer,
        agent,
        session.backbone(agent),
        learning,
        train=examples.train,
        held_out=examples.held_out[: section.eval_records],
        batch_size=section.outer.batch_size,
        checkpointed=section.checkpoint_calls,
        compute=session.compute,
    )


def _check_learning(session: Session, stage: Stage) -> None:
    """Make sure that there is something to learn, before anything that takes long."""
    reached = session.graph.used_links
    hint = "Take a link out of `train.outer.freeze`, or raise `latent_steps` or `rounds`."
    setting: tuple[str, ...] = ("outer", "freeze")
    if stage == "inner" and not session.thinkers:
        why, setting = "no agent that thinks has a target", ("targets",)
        hint = "Give an agent `latent_steps` above 0 and a field in `train.targets`."
    elif stage != "inner" and not reached:
        why = "no message is on its way to the answer"
    elif stage != "inner" and reached.isdisjoint(_learning(session)):
        why = "all links that the answer depends on are frozen"
    elif stage != "inner" and (unfit := _without_offset(session)) is not None:
        link_id, kind = unfit
        place = session.spec.position("train", "outer", "center")
        raise RecmasError(problem_at(place, "RM105", no_bias(link_id, kind), hint=BIAS_HINT))
    else:
        return
    message = f"the {'inner' if stage == 'inner' else 'outer'} stage has nothing to learn: {why}."
    place = session.spec.position("train", *setting)
    raise RecmasError(problem_at(place, "RM705", message, hint=hint))


def _without_offset(session: Session) -> tuple[str, LinkKind] | None:
    """Return a link that is to be centred and has no bias, with its kind."""
    if not session.settings.section.outer.center:
        return None
    weights = session.system.link_weights
    outer = [link for link in _learning(session) if link in session.system.links]
    kinds = ((link, weights[link].kind) for link in outer)
    return next(((link, k) for link, k in kinds if not FORMS[k, "outer"].has_biases), None)


def _inner_stage(
    session: Session, options: RunOptions, report: RunReport, *, is_last: bool
) -> None:
    states = {agent: _hidden_states(session, agent, options.folder) for agent in session.thinkers}
    links = _start(
        session,
        options,
        report,
        session.settings.section.inner,
        place="inner",
        make=lambda: session.start(
            hidden_states={agent: train for agent, (train, _) in states.items()}
        ),
    )
    _note_starts(report, links)
    figures = report.stages["inner"] = {}
    for agent in session.thinkers:
        start = links[inner_link_id(agent)]
        result, levels = _train_agent(session, agent, options, report, *states[agent], start=start)
        figures[agent] = {**result.figures, "baselines": levels}
        if result.interrupted:
            report.interrupted = True
            return
    report.trained = tuple(inner_link_id(agent) for agent in session.thinkers)
    kept = {link_id: links[link_id] for link_id in report.trained}
    run = options.folder
    keep_links(session, kept, report, folders=(run / "inner" / LINKS,), run=run)
    if is_last:  # else an outer stage that fails would leave half a training in the place of links
        keep_links(session, links, report, folders=(session.settings.links_dir,), run=run)


def _hidden_states(session: Session, agent: str, folder: Path) -> tuple[HiddenStates, HiddenStates]:
    """Return an agent's hidden states over the training records, and over the held-out ones."""
    settings = session.settings.section
    train = session.target_calls(agent, session.examples.train)
    held_out = session.target_calls(agent, session.examples.held_out[: settings.eval_records])
    states = cached_hidden_states(
        session.backbone(agent),
        [*train, *held_out],
        folder=folder / HIDDEN_STATES,
        max_bytes=settings.cache_mb * 2**20 // len(session.thinkers),
        world=session.world,
        progress=session.progress,
    )
    return states.part(0, len(train)), states.part(len(train), len(held_out))


def _train_agent(
    session: Session,
    agent: str,
    options: RunOptions,
    report: RunReport,
    train: HiddenStates,
    held_out: HiddenStates,
    *,
    start: MaterializedLink,
) -> tuple[LoopResult, dict[str, float]]:
    stage, levels = session.settings.section.inner, {}
    if len(held_out):
        levels = inner_baselines(
            agent,
            start.weights.kind,
            train=train,
            held_out=held_out,
            aligned=start.module if start.init == "aligned" else None,
            world=session.world,
        )
    task = InnerTask(
        agent,
        session.graph.link(inner_link_id(agent)),
        train=train,
        held_out=held_out,
        mse_weight=stage.mse_weight,
    )
    place = inner_place(agent)
    return _run_loop(session, task, stage, options, report, place=place, levels=levels), levels


def _outer_stage(session: Session, options: RunOptions, report: RunReport) -> None:
    settings = session.settings.section
    inner = options.folder / "inner" / LINKS
    _check_whole(inner)
    links = _start(
        session,
        options,
        report,
        settings.outer,
        place=OUTER,
        make=lambda: session.start(trained=inner if inner.is_dir() else None),
    )
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
        rates=_rates(settings.outer, learning),
        additions=Additions(
            session.graph,
            settings.outer,
            learning=learning,
            train=session.examples.train,
            seed=settings.seed,
        )
        if settings.outer.has_additions
        else None,
    )
    result = _run_loop(session, task, settings.outer, options, report, place=OUTER)
    report.stages[OUTER] = {**result.figures, "shuffled": task.control_figures()}
    report.interrupted = result.interrupted
    if not result.interrupted:
        report.trained = tuple(dict.fromkeys((*learned, *learning)))
        folders = (options.folder / OUTER / LINKS, session.settings.links_dir)
        keep_links(session, links, report, folders=folders, run=options.folder)


def _start(
    session: Session,
    options: RunOptions,
    report: RunReport,
    stage: StageSection,
    *,
    place: str,
    make: Callable[[], dict[str, MaterializedLink]],
) -> dict[str, MaterializedLink]:
    links, warnings = started(
        session,
        options.folder / place,
        make,
        identity=run_identity(
            session.program, session.spec, session.settings, session.examples, stage
        ),
        resume=options.resume,
    )
    report.warnings += warnings
    return links


def _check_whole(links: Path) -> None:
    """Make sure that the links which an inner stage left are there as it wrote them, if it did.

    Raises:
        RecmasError: RM703.
    """
    try:
        finish_replacing(links)
        receipt = read_receipt(links / RECEIPT_NAME)
        if receipt is None and any(links.glob("*.safetensors")):
            raise ReceiptError("there is none")
        for link_id, entry in receipt.links.items() if receipt else ():
            if sha256_of(links / link_file_name(link_id)) != entry.sha256:
                raise ReceiptError(f"`{link_id}` is not what was written")
    except (ReceiptError, RecmasError, OSError) as error:
        why = error.problems[0].message if isinstance(error, RecmasError) else error
        raise fail(
            "RM703",
            f"the links of the inner stage in {links} cannot be used: their {RECEIPT_NAME}: {why}",
            hint="Train the inner stage anew into another --out, or delete this folder.",
        ) from error


def _learning(session: Session) -> tuple[str, ...]:
    """Return the links that learn in the outer stage."""
    outer, system = session.settings.section.outer, session.system
    frozen = {_link_id(name) for name in outer.freeze}
    inner = () if outer.freeze_inner else map(inner_link_id, system.agents)
    learning = (link_id for link_id in (*inner, *system.links) if link_id not in frozen)
    return tuple(link_id for link_id in learning if link_id in system.link_weights)


def _rates(stage: OuterStageSection, learning: Collection[str]) -> dict[str, float]:
    """Return the highest learning rate of every link that has one of its own."""
    given = stage.rates or {}
    by_link = {_link_id(name): rate for name, rate in given.items() if name not in LINK_GROUPS}
    found: dict[str, float] = {}
    for link_id in learning:
        group = "inner" if is_inner(link_id) else "outer"
        if link_id in by_link or group in given:
            found[link_id] = by_link.get(link_id, given.get(group, 0.0))
    return found


def _link_id(name: str) -> str:
    """Return the id of what `train.outer.freeze` names: a link, or an agent for its inner link."""
    link = canonical_link_name(name)
    return inner_link_id(name) if link is None else outer_link_id(*link_ends(link))


def _free_others(session: Session, kept: TorchBackbone) -> None:
    """Free the memory of backbones that do not run, so that it is not counted."""
    for backbone in session.backbones.values():
        if backbone is not kept:
            backbone.model.to("meta")
    if session.world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(session.world.device)


def _run_loop(
    session: Session,
    task: Task,
    stage: StageSection,
    options: RunOptions,
    report: RunReport,
    *,
    place: str,
    levels: Mapping[str, float] | None = None,
    own: tuple[Section, ...] = (),
) -> LoopResult:
    """Train a task to its end, or until it is interrupted; leave costs and curves in its folder."""
    world, folder, title = session.world, options.folder / place, place.replace("/", " ")
    loop = Loop(
        task,
        session.settings.section,
        stage,
        folder=folder,
        identity=run_identity(
            session.program, session.spec, session.settings, session.examples, stage, *own
        ),
        machine={"dtype": session.dtype},
        world=world,
        sink=options.make_sink(title) if options.make_sink and world.is_main else None,
    )
    result = loop.run(resume=options.resume, title=title, progress=session.progress)
    report.warnings += result.warnings
    if world.is_main:
        with writing(folder):
            if levels:
                text = json.dumps(dict(levels), indent=1) + "\n"
                write_whole(folder / BASELINES, text)
            try:
                write_cost(folder, task.links, world)
                draw_curves(folder, title=f"{session.system.name}: {title}", levels=levels)
            except (MetricsError, ValueError, TypeError, KeyError, ArithmeticError) as error:
                report.warnings += (_no_figures(folder, error),)
    return result


def _no_figures(folder: Path, error: Exception) -> Problem:
    """Warn that what a loop wrote of itself was changed by somebody; links do not depend on it."""
    return Problem(
        code="RM753",
        severity="warning",
        message=f"{METRICS_NAME} in {folder} cannot be read ({first_line(error)}); there are no "
        f"{COST_NAME} and no curves",
        hint="The links are whole.",
    )


def _note_starts(report: RunReport, links: Mapping[str, MaterializedLink]) -> None:
    for link_id, link in links.items():
        report.starts.setdefault(link_id, link.init)
