"""The Python door: spec -> program -> torch module or bundle; the command line goes through it.

Torch, transformers and ONNX are imported only by the functions that need them, so that checking a
spec stays fast and works where they are not installed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from recmas_compiler.backbones.fetching.hub import Fetch
from recmas_compiler.ir.build_topology import build_topology, missing_parts
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.links.files import end_of
from recmas_compiler.links.trained import TrainedLinks, find_trained_links
from recmas_compiler.lowering.prompt_trial import template_digests, try_prompts
from recmas_compiler.passes.pass_base import DumpIR, Instrument, Record, RecordPasses
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.document.problems import in_reading_order
from recmas_compiler.spec.schema.train import MethodName, Stage
from recmas_compiler.spec.spec import Spec, SpecError, load_spec
from recmas_runtime.core.errors import Problem, RecmasError, fail, how_to_install
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.formats.manifest import ParityEntry

if TYPE_CHECKING:
    from recmas_compiler.evaluation.evaluate import Evaluated
    from recmas_compiler.lowering.reference import TorchSystem
    from recmas_compiler.training.loop.loop import Sink
    from recmas_compiler.training.receipt import RunReport
    from recmas_runtime.checking.build_tensorrt import EngineBuild

_COMPILE_FIRST: Final = "`compile` makes one of a spec."
# Where a package says that it builds bundles; recmas_export does.
BUILDERS: Final = "recmas.builders"


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled system: its spec, its topology, and the program after all passes.

    Printing it shows the unrolled program. Records are the graph before and after every pass. The
    trained links are those that `recmasc train` left beside the spec, where the program uses them.
    """

    spec: Spec
    topology: Graph
    graph: Graph
    records: tuple[Record, ...]
    trained: TrainedLinks | None = None

    def __str__(self) -> str:
        return print_graph(self.graph)


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a builder gave; nothing was done if it was reused.

    Wall time is by stage: fingerprint, load, links, export, parity, write. Parts that were taken
    from the user's cache, and those that were made, are counted by kind.
    """

    path: Path
    fingerprint: str
    reused: bool
    parity: tuple[ParityEntry, ...]
    seconds: dict[str, float]
    engines: EngineBuild | None = None
    from_cache: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()


# Exports engines and writes a bundle, as `build` below.
Builder = Callable[..., BuildResult]


def compile(
    spec: Spec,
    *,
    dump_ir: str | Path | None = None,
    download: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Program:
    """Lower a spec to the program IR, through all passes; no weights are loaded.

    Args:
        download: Fetch what is missing of `hf:` backbones; else the network is not used.
        offline: Refuse `hf:` backbones of which anything is missing that a build loads.
        progress: Receives what is fetched.

    Raises:
        RecmasError: Backbone files that are missing or unsuitable (RM2xx), link files that do not
            fit (RM120), and every other finding that needs the backbones' dimensions; prompts that
            a chat template does not write as they are (RM206), where it is at hand.
    """
    _demand(spec, Spec, "`load_spec` reads one from a file, `parse_spec` from text.")
    fetch = None
    if download or offline:
        fetch = Fetch(progress=progress or Silent(), offline=offline)
    topology = build_topology(spec, fetch=fetch)
    warnings = try_prompts(spec, topology.system)
    spec = replace(spec, warnings=tuple(dict.fromkeys((*spec.warnings, *warnings))))
    recorder = RecordPasses()
    instruments: tuple[Instrument, ...] = (recorder,)
    if dump_ir is not None:
        instruments += (DumpIR(Path(dump_ir)),)
    graph = run_pipeline(topology, instruments=instruments)
    return Program(spec=spec, topology=topology, graph=graph, records=tuple(recorder.records))


def load_and_compile(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    dump_ir: str | Path | None = None,
    progress: Progress | None = None,
    offline: bool = False,
    change: Callable[[Spec], Spec] | None = None,
) -> Program:
    """Load a spec from a file, change it if asked, and compile it.

    Missing `hf:` backbones are fetched only where there is a progress to report to; see `compile`.

    Raises:
        RecmasError: As of `load_spec` and `compile`.
    """
    try:
        spec = load_spec(path, overrides=overrides)
    except SpecError as error:
        if error.spec is None:
            raise
        # All at once: what is wrong in the spec, and what its files lack.
        found = (*error.problems, *missing_parts(error.spec))
        raise RecmasError(in_reading_order(found)) from error
    if change is not None:
        spec = change(spec)
    download = progress is not None and not offline
    return compile(spec, dump_ir=dump_ir, download=download, offline=offline, progress=progress)


def with_trained_links(program: Program, *, dump_ir: str | Path | None = None) -> Program:
    """Return the program with the links that `recmasc train` left beside its spec.

    What is there and does not fit is ignored, with a warning RM751 in the spec's `warnings`; the
    same program comes back where nothing was trained.
    """
    _demand(program, Program, _COMPILE_FIRST)
    if program.trained is not None:
        return program
    system = program.graph.system
    facts = {name: system.backbone_of(name).facts for name in system.local_agents}
    ends = {name: end_of(backbone) for name, backbone in facts.items()}
    trained = find_trained_links(program.spec, ends, templates=template_digests(system))
    if trained is None:
        return program
    return replace(compile(trained.spec, dump_ir=dump_ir), trained=trained)


def to_torch(program: Program) -> TorchSystem:
    """Return the program as an `nn.Module` that runs it eagerly: the reference of every engine."""
    from recmas_compiler.lowering.reference import to_torch as lower

    _demand(program, Program, _COMPILE_FIRST)
    return lower(program.graph)


def build(
    program: Program,
    out: str | Path,
    *,
    progress: Progress | None = None,
    trained_links: bool = True,
    **options: Any,
) -> Path:
    """Export engines, check them against the reference and write a bundle; returns its folder.

    Args:
        out: The bundle's folder. An older bundle there is replaced in one rename.
        trained_links: Use the links that `recmasc train` left beside the spec.
        options: Of the builder, `recmas_export.build.build`: `reuse=False` builds anew even if
            `out` already holds the bundle of this very program.

    Raises:
        RecmasError: RM201 if no builder is installed, RM301 if an engine disagrees with the
            reference, RM302 if something else is at `out`, RM303 if the disk is full.
    """
    _, built = build_bundle(program, out, progress=progress, trained_links=trained_links, **options)
    return built.path


def build_bundle(
    program: Program,
    out: str | Path,
    *,
    progress: Progress | None = None,
    trained_links: bool = True,
    dump_ir: str | Path | None = None,
    **options: Any,
) -> tuple[Program, BuildResult]:
    """Build as `build` does; returns the program, with trained links where there are some, too."""
    _demand(program, Program, _COMPILE_FIRST)
    builder = _builder()
    if trained_links:
        program = with_trained_links(program, dump_ir=dump_ir)
    built = builder(
        program.graph, spec=program.spec, out=Path(out), progress=progress or Silent(), **options
    )
    return program, built


def train(
    program: Program,
    out: str | Path | None = None,
    *,
    stage: Stage = "all",
    method: MethodName | None = None,
    steps: int | None = None,
    resume: bool = False,
    make_sink: Callable[[str], Sink] | None = None,
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunReport:
    """Train a program's links; they land beside its spec, where `build` finds them.

    Args:
        out: Folder for metrics, checkpoints and curves; None for `out/NAME-training`.
        stage: Inner links agent by agent, all links through the whole program, or both in turn.
        method: In the place of links `lora` or `sft` trains the answer agent's backbone alone,
            `text` that of all agents, which write for each other.
        steps: Of each stage, instead of what the spec says.
        resume: Go on from the last checkpoints in `out`.
        make_sink: Takes a stage's name and gives what receives its metrics, entry by entry.
        trackers: `tensorboard`, `wandb`, `mlflow` or `trackio`, which write into `out` or, as
            `NAME=PLACE`, elsewhere.

    Raises:
        RecmasError: RM104 without `train`, RM302 if `out` holds a run or another training writes
            there, RM303 if the disk is full, RM700 for data that cannot be used, RM702 if memory
            does not suffice, RM703 if there is nothing to go on from, RM705 if there is nothing to
            learn, RM506 for arguments that mean nothing.
    """
    _demand(program, Program, _COMPILE_FIRST)
    _check_training(stage, method, steps)
    from recmas_compiler.trackers.tracking import chosen_trackers
    from recmas_compiler.training.preflight import prepared_run
    from recmas_compiler.training.settings import train_settings, with_steps

    chosen = chosen_trackers(trackers)
    settings = train_settings(program.spec)
    if steps is not None:
        settings = with_steps(settings, steps)
    folder = training_folder(program.spec) if out is None else Path(out)
    with prepared_run(
        program.spec,
        program.graph,
        settings,
        stage=stage,
        folder=folder,
        resume=resume,
        method=method,
    ) as examples:
        from recmas_compiler.training.run import RunOptions, train_program

        options = RunOptions(folder=folder, resume=resume, make_sink=make_sink, trackers=chosen)
        _, report = train_program(
            program.spec,
            program.graph,
            settings,
            examples,
            options,
            stage=stage,
            method=method,
            progress=progress or Silent(),
        )
        return report


def training_folder(spec: Spec) -> Path:
    """Return where a training leaves metrics, checkpoints and curves unless told otherwise."""
    return Path("out") / f"{spec.document.name}-training"


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    protocol: str,
    baselines: Sequence[str] = (),
    untrained_bundle: str | Path | None = None,
    limit: int | None = None,
    seeds: Sequence[int] = (),
    score: str | None = None,
    overrides: Sequence[str] = (),
    batch: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    skip_broken: bool = False,
    trackers: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Ask a bundle the questions of a data set, as `recmasc eval` does; returns its report.

    Args:
        data: JSON lines, a JSON list, CSV or Parquet, also gzipped.
        protocol: The name of one that comes with recmas, or a `.yaml` file.
        baselines: Systems to run, in this order; the latent system alone if none is named.
        untrained_bundle: The same system with untrained links, for `untrained-links`.
        limit: Records to ask, in place of the protocol's.
        seeds: In place of the protocol's.
        score: `text`, `candidates` or `likelihood`, in place of the protocol's.
        overrides: `KEY=VALUE` of the protocol.
        batch: Records per batch; None for the most that the bundle takes.
        out: Folder for answers and report; None for `out/SYSTEM-PROTOCOL`.
        resume: Go on with the answers that are there.
        skip_broken: Leave records out whose own solution fails their tests.
        trackers: As in `train`.
        device: `auto`, `cpu`, `cuda` or `tensorrt`.
        threads: None for the physical cores.

    Raises:
        RecmasError: RM600 for the protocol, RM601 for data that does not fit it, RM602 without a
            sandbox for code, RM603 or RM302 for answers that are there, RM503 if it cannot write.
    """
    from recmas_compiler.evaluation.evaluate import EvalOptions, option_overrides
    from recmas_compiler.evaluation.evaluate import evaluate as run_evaluation

    listed_seeds = ",".join(map(str, seeds)) or None
    options = EvalOptions(
        bundle=Path(bundle),
        data=Path(data),
        protocol=protocol,
        baselines=(baselines,) if isinstance(baselines, str) else tuple(baselines),
        untrained_bundle=None if untrained_bundle is None else Path(untrained_bundle),
        overrides=(*overrides, *option_overrides(limit, listed_seeds, score)),
        batch=batch,
        out=None if out is None else Path(out),
        resume=resume,
        device=device,
        threads=threads,
        skip_broken=skip_broken,
        trackers=tuple(trackers),
    )
    return run_evaluation(options, progress=progress or Silent())


def _demand(value: object, kind: type, hint: str) -> None:
    """Refuse an argument that is something else, before anything of it is looked at."""
    if not isinstance(value, kind):
        given = type(value).__name__
        raise fail("RM506", f"this takes a {kind.__name__}, not a {given}", hint=hint)


def _check_training(stage: str, method: str | None, steps: object) -> None:
    """Refuse what the command line cannot say either: it would train nothing."""
    names = (("stage", stage, get_args(Stage)), ("method", method, (None, *get_args(MethodName))))
    for name, given, known in names:
        if given not in known:
            hint = f"Choose one of {', '.join(map(repr, known))}."
            raise fail("RM506", f"{name} is {given!r}", hint=hint)
    whole = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1
    if steps is not None and not whole:
        raise fail("RM506", f"steps is {steps!r}", hint="Give a whole number from 1 on, or None.")


def _builder() -> Builder:
    """Return the installed builder; the compiler itself knows none, so nothing here imports it."""
    for entry in importlib.metadata.entry_points(group=BUILDERS):
        builder: Builder = entry.load()
        return builder
    raise fail(
        "RM201",
        "no package that builds bundles is installed",
        hint=how_to_install("compile"),
    )
