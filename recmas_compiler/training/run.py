"""The stages of a run, one after the other, and what they leave behind: links and their receipt."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from recmas_compiler.backbones.torch_model import TorchBackbone, weights_digest
from recmas_compiler.links.modules import save_link
from recmas_compiler.links.trained import RECEIPT_NAME, RECEIPT_VERSION
from recmas_compiler.lowering.materialize import MaterializedLink
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import Section
from recmas_compiler.spec.schema.train import Stage, TrainSection
from recmas_compiler.training.data.hidden_state_cache import HiddenStates, cached_hidden_states
from recmas_compiler.training.loop.checkpoint import writing
from recmas_compiler.training.loop.loop import Loop, LoopResult, Sink, StageSection, Task
from recmas_compiler.training.loop.metrics import draw_curves, write_cost
from recmas_compiler.training.session import Session, element_type
from recmas_compiler.training.tasks.finetuning import (
    METHODS,
    MethodName,
    SingleAgentTask,
    calls_without_slots,
)
from recmas_compiler.training.tasks.inner import InnerTask, inner_baselines
from recmas_compiler.training.tasks.outer import OuterTask
from recmas_runtime.checking.machine import package_versions
from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.ids import (
    canonical_link_name,
    inner_link_id,
    link_ends,
    link_file_name,
    outer_link_id,
)

LINKS: Final = "links"
HIDDEN_STATES: Final = "hidden_states"
BASELINES: Final = "baselines.json"

_VERSIONS: Final = ("recmas", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is started.

    Attributes:
        folder: Where metrics, checkpoints and curves go, by stage.
        make_sink: Gives a stage's metrics another reader.
    """

    folder: Path
    resume: bool
    make_sink: Callable[[str], Sink] | None = None


@dataclass
class RunReport:
    """What a run did.

    Attributes:
        starts: By link id: where its weights came from before the last stage.
        trained: Ids of the links that learned, in this folder's earlier runs too.
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


def run_method(session: Session, method: MethodName, options: RunOptions) -> RunReport:
    """Train the answer agent's backbone in the place of links, which stay as they are.

    Steps, batches, their order and the records are those of the outer stage.

    Args:
        session: Its answer agent's backbone is changed; the other backbones are freed.
        options: How the run is started; results are in its folder's `lora` or `sft`.

    Raises:
        RecmasError: As `Loop.run`; RM201 without peft, RM303 if results cannot be written, RM704 if
            there are more processes than records in a batch.
    """
    agent, section, world = session.system.answer_agent, session.settings.section, session.world
    check_processes(section, "outer", world.size)
    backbone = session.backbone(agent)
    _free_others(session, backbone)
    learner = METHODS[method](backbone, section)
    task = SingleAgentTask(
        calls_without_slots(session.system, session.backbones, agent),
        agent,
        backbone,
        {f"{agent}.{method}": learner.weights},
        train=session.examples.train,
        held_out=session.examples.held_out[: section.eval_records],
        batch_size=section.outer.batch_size,
        checkpointed=section.checkpoint_calls,
        compute=element_type(section.backbone_dtype, world.device),
    )
    stage = section.outer.model_copy(update={"lr": learner.settings.lr})
    result = _run_loop(session, task, stage, options, place=method, own=(learner.settings,))
    if not result.interrupted and world.is_main:
        with writing(options.folder / method):
            learner.save(options.folder / method)
    world.wait()
    return RunReport(stages={method: result.figures}, interrupted=result.interrupted)


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
    else:
        return
    message = f"the {'inner' if stage == 'inner' else 'outer'} stage has nothing to learn: {why}."
    place = session.spec.position("train", *setting)
    raise RecmasError(problem_at(place, "RM705", message, hint=hint))


def _inner_stage(
    session: Session, options: RunOptions, report: RunReport, *, is_last: bool
) -> None:
    states = {agent: _hidden_states(session, agent, options.folder) for agent in session.thinkers}
    links = session.start(hidden_states={agent: train for agent, (train, _) in states.items()})
    _note_starts(report, links)
    figures = report.stages["inner"] = {}
    for agent in session.thinkers:
        start = links[inner_link_id(agent)]
        result, levels = _train_agent(session, agent, options, *states[agent], start=start)
        figures[agent] = {**result.figures, "baselines": levels}
        if result.interrupted:
            report.interrupted = True
            return
    report.trained = tuple(inner_link_id(agent) for agent in session.thinkers)
    kept = {link_id: links[link_id] for link_id in report.trained}
    _keep(session, kept, report, folders=(options.folder / "inner" / LINKS,))
    if is_last:  # else an outer stage that fails would leave half a training in the place of links
        _keep(session, links, report, folders=(session.settings.links_dir,))


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
    place = f"inner/{agent}"
    return _run_loop(session, task, stage, options, place=place, levels=levels), levels


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
    result = _run_loop(session, task, settings.outer, options, place="outer")
    report.stages["outer"] = result.figures
    report.interrupted = result.interrupted
    if not result.interrupted:
        report.trained = tuple(dict.fromkeys((*learned, *learning)))
        folders = (options.folder / "outer" / LINKS, session.settings.links_dir)
        _keep(session, links, report, folders=folders)


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
        identity=_identity(session, task.links, stage, *own),
        world=world,
        sink=options.make_sink(title) if options.make_sink and world.is_main else None,
    )
    result = loop.run(resume=options.resume, title=title, progress=session.progress)
    if world.is_main:
        with writing(folder):
            write_cost(folder, task.links, world)
            if levels:
                text = json.dumps(dict(levels), indent=1) + "\n"
                (folder / BASELINES).write_text(text, encoding="utf-8")
            draw_curves(folder, title=f"{session.system.name}: {title}", levels=levels)
    return result


def _identity(session: Session, links: Mapping[str, nn.Module], *own: Section) -> dict[str, str]:
    """Return what a run is made of, for a checkpoint to refuse another one."""
    starts = "".join(f"{link_id} {weights_digest(link)}\n" for link_id, link in links.items())
    return {
        "the system": session.spec.digest,
        "the chat templates": _sha256(*(b.chat_template for b in session.backbones.values())),
        "the data": " ".join(session.examples.digests.values()),
        "the settings": session.settings.digest(*own),
        "the links at the start": _sha256(starts),
    }


def _sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _note_starts(report: RunReport, links: Mapping[str, MaterializedLink]) -> None:
    for link_id, link in links.items():
        report.starts.setdefault(link_id, link.init)


def _keep(
    session: Session,
    links: Mapping[str, MaterializedLink],
    report: RunReport,
    *,
    folders: Sequence[Path],
) -> None:
    if session.world.is_main:
        for folder in folders:
            with writing(folder):
                _write_links(folder, session, links, report)
    session.world.wait()


def _write_links(
    folder: Path, session: Session, links: Mapping[str, MaterializedLink], report: RunReport
) -> None:
    """Write link files and, last, the receipt that confirms them; each is complete or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECEIPT_NAME).unlink(missing_ok=True)  # it does not confirm what comes now
    entries = {}
    for link_id, link in links.items():
        path = folder / link_file_name(link_id)
        staged = path.with_name(f".{path.name}.writing")
        save_link(staged, session.graph.link(link_id), source=link.source, target=link.target)
        staged.replace(path)
        entries[link_id] = {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "start": report.starts[link_id],
            "trained": link_id in report.trained,
        }
    text = json.dumps({**_receipt(session, report), "links": entries}, indent=1, ensure_ascii=False)
    staged = folder / f".{RECEIPT_NAME}.writing"
    staged.write_text(text + "\n", encoding="utf-8")
    staged.replace(folder / RECEIPT_NAME)


def _receipt(session: Session, report: RunReport) -> dict[str, Any]:
    """Return what a trained bundle says about its training, without the links' own entries.

    It holds no times, so that the same training gives the same receipt.
    """
    settings, examples = session.settings.section, session.examples
    return {
        "receipt": RECEIPT_VERSION,
        "name": session.spec.document.name,
        "system": session.spec.digest,
        "data": {
            "sha256": dict(examples.digests),
            "train": len(examples.train),
            "held_out": len(examples.held_out),
            "left_out": dict(examples.left_out),
        },
        "settings": settings.model_dump(mode="json", exclude={"data", "links_dir"}),
        "stages": {name: dict(figures) for name, figures in report.stages.items()},
        "processes": session.world.size,
        "device": session.world.device.type,
        "versions": {
            "python": platform.python_version(),
            **{name: version or "unknown" for name, version in package_versions(_VERSIONS).items()},
        },
    }
