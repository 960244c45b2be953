"""What is looked at before anything takes long: folders, settings, data, an earlier run. No torch.

Models load for minutes and closed forms are computed for more: what will be refused is refused
before.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, get_args

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Think
from recmas_compiler.ir.text_links import writing_agents
from recmas_compiler.lowering.prompt_trial import template_digests
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.sections import Section, WeightsSection
from recmas_compiler.spec.schema.train import MethodName, Stage, TrainSection
from recmas_compiler.spec.spec import Spec
from recmas_compiler.training.data.examples import Examples
from recmas_compiler.training.loop.checkpoint_head import (
    CHECKPOINTS,
    check_same_run,
    check_unused,
    newest_head,
)
from recmas_compiler.training.settings import TrainSettings
from recmas_runtime.core.errors import Problem, RecmasError, fail
from recmas_runtime.core.files import exclusive, sha256_of

OUTER: Final = "outer"
HIDDEN_STATES: Final = "hidden_states"
# What a run's folder holds of its own; the user may keep other things there.
_PLACES: Final = ("inner", OUTER, *get_args(MethodName), HIDDEN_STATES)


@contextmanager
def prepared_run(
    spec: Spec,
    program: Graph,
    settings: TrainSettings,
    *,
    stage: Stage,
    folder: Path,
    resume: bool,
    method: MethodName | None = None,
    num_processes: int = 1,
    is_main: bool = True,
) -> Iterator[Examples]:
    """Give the data of a run that can begin; until the block ends the folder is this run's alone.

    Args:
        folder: Where metrics, checkpoints and curves go; made if need be.
        method: What learns in the place of links.
        is_main: Whether this process writes.

    Raises:
        RecmasError: RM302 if the folder holds a run and `resume` is off, or another training writes
            there; RM303 if results could not be written; RM700 for data that cannot be used; RM703
            if the checkpoints are of another run; RM704 for more processes than a batch has
            records; RM705 if a text system has nobody to learn from.
    """
    shared: Stage = stage if method is None else "outer"
    if method == "text":
        _check_texts(spec, program, settings)
    check_processes(settings.section, shared, num_processes)
    loops = _loops(program, settings, stage, method)
    for place, _ in loops:
        check_unused(folder / place, resume=resume)
    _check_writable(folder)
    if method is None:
        _check_writable(settings.links_dir)
    with claimed(folder) if is_main else nullcontext():
        if is_main:
            _clear_away(folder)
        examples = settings.examples(spec)
        for place, own in loops:
            newest = newest_head(folder / place / CHECKPOINTS) if resume else None
            if newest is not None:
                path, head = newest
                own_identity = run_identity(program, spec, settings, examples, *own)
                check_same_run(path, head.identity, own_identity)
        yield replace(
            examples, warnings=examples.warnings + _large_batches(spec, settings, examples, shared)
        )


def run_identity(
    program: Graph, spec: Spec, settings: TrainSettings, examples: Examples, *own: Section
) -> dict[str, str]:
    """Return what a loop is made of, for a checkpoint to refuse another one.

    The links that it starts from are no part of it: they are kept with the run, and where they are
    computed anew on another machine they differ in their last bits.

    Args:
        own: The stage's section, and that of the method if it is not links that learn.
    """
    document = spec.document
    links: list[WeightsSection] = [agent.inner for agent in document.agents.values()]
    links += document.links.values()
    files = [path_of(link.weights, spec.base_dir) for link in links if link.weights is not None]
    digests = "".join(f"{sha256_of(file)}\n" for file in files)
    backbones = program.system.backbones.values()
    return {
        "the system": spec.digest,
        "the backbones": _digest(*(backbone.facts.identity for backbone in backbones)),
        "the chat templates": _digest(*template_digests(program.system).values()),
        "the data": " ".join(examples.digests.values()),
        "the settings": settings.digest(*own),
        "the link files": _digest(digests),
    }


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "backslashreplace")).hexdigest()


def thinkers(program: Graph, settings: TrainSettings) -> tuple[str, ...]:
    """Return the agents that make latent steps and have a target."""
    thinking = {
        agent for _, op in program.in_order() if isinstance(op, Think) for agent in op.agents
    }
    return tuple(agent for agent in settings.section.targets if agent in thinking)


def check_processes(section: TrainSection, stage: Stage, num_processes: int) -> None:
    """Make sure that every process has a record of every batch.

    Raises:
        RecmasError: RM704.
    """
    for name, batch_size in _batch_sizes(section, stage).items():
        if batch_size < num_processes:
            raise fail(
                "RM704",
                f"{num_processes} processes cannot share batches of {batch_size} records",
                hint=f"Start fewer processes, or raise `train.{name}.batch_size`.",
            )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a folder for the block; remove it again if it stays empty.

    Raises:
        RecmasError: RM302 if another training writes there, RM303 if it cannot be made.
    """
    made: list[Path] = []
    with ExitStack() as stack:
        try:
            for path in reversed((folder, *folder.parents)):
                if not path.is_dir():
                    path.mkdir(exist_ok=True)
                    made.append(path)
            stack.enter_context(exclusive(folder, code="RM302", what="training"))
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            yield
        finally:
            with suppress(OSError):
                for path in reversed(made):
                    path.rmdir()


def _check_texts(spec: Spec, program: Graph, settings: TrainSettings) -> None:
    """Make sure that the data has a text for everyone who writes, and that one backbone learns.

    Raises:
        RecmasError: RM705.
    """
    system, place = program.system, spec.position("train", "targets")
    writing = writing_agents(system)
    for agent in writing:
        if agent not in settings.section.targets:
            message = f"nothing says what `{agent}` should write: it has no target."
            hint = f"Name a field of the data in `train.targets.{agent}`."
            raise RecmasError(problem_at(place, "RM705", message, hint=hint))
    backbones = sorted({system.backbone_of(agent).name for agent in writing})
    if len(backbones) > 1:
        named = ", ".join(f"`{name}`" for name in backbones)
        message = f"--method text trains one backbone, and the agents are on {named}."
        hint = "Put all agents on one backbone, or train links."
        place = spec.position("backbones", backbones[-1])
        raise RecmasError(problem_at(place, "RM705", message, hint=hint))


def inner_place(agent: str) -> str:
    """Return the folder of an agent's inner loop within a run's."""
    return f"inner/{agent}"


def _loops(
    program: Graph, settings: TrainSettings, stage: Stage, method: MethodName | None
) -> list[tuple[str, tuple[Section, ...]]]:
    """Return the folder of every loop of a run, and the settings that are its own."""
    section = settings.section
    if method is not None:
        own = section.lora if method == "lora" else section.sft
        return [(method, (section.outer.model_copy(update={"lr": own.lr}), own))]
    loops: list[tuple[str, tuple[Section, ...]]] = []
    if stage in ("inner", "all"):
        loops += [(inner_place(agent), (section.inner,)) for agent in thinkers(program, settings)]
    if stage in ("outer", "all"):
        loops.append((OUTER, (section.outer,)))
    return loops


def _batch_sizes(section: TrainSection, stage: Stage) -> dict[str, int]:
    sizes = {"inner": section.inner.batch_size, "outer": section.outer.batch_size}
    return {name: size for name, size in sizes.items() if stage in (name, "all")}


def _large_batches(
    spec: Spec, settings: TrainSettings, examples: Examples, stage: Stage
) -> tuple[Problem, ...]:
    num_records = len(examples.train)
    return tuple(
        problem_at(
            spec.position("train", name, "batch_size"),
            "RM758",
            f"batches of {size} records are filled by taking the {num_records} training records "
            "again and again.",
            hint=f"Set `train.{name}.batch_size` to {num_records} or less; the same is learned.",
            severity="warning",
        )
        for name, size in _batch_sizes(settings.section, stage).items()
        if size > num_records
    )


def _clear_away(folder: Path) -> None:
    """Remove what a killed run was writing; its folder is ours alone now."""
    for place in _PLACES:
        for left in list((folder / place).rglob(".*writing*")):
            with suppress(OSError):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink(missing_ok=True)


def _check_writable(folder: Path) -> None:
    """Make sure that a folder can be made or written to, before anything takes long."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise NotADirectoryError(20, "a file is in the place of a folder", str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied", str(there))
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> RecmasError:
    hint = "Choose another --out, or another `train.links_dir`."
    return fail("RM303", f"cannot write {folder}: {error.strerror or error}", hint=hint)
