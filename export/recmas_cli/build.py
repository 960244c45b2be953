"""`recmasc build`: a bundle, with the trained links that lie beside the spec."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import click

from recmas_cli.console import (
    DUMP_IR,
    FILE,
    OFFLINE,
    QUIET,
    SET,
    SPEC,
    Outcome,
    command,
    shown_progress,
)
from recmas_compiler.api import Program, build_bundle, load_and_compile
from recmas_compiler.backbones.sources import BUILTINS
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.links.trained import has_trained_links, untrained_links
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_export.cache.build_parts import Reuse
from recmas_runtime.cli.inspect import loss_text
from recmas_runtime.core.errors import Problem
from recmas_runtime.core.progress import Progress
from recmas_runtime.core.text import counted, human_bytes
from recmas_runtime.engines.tensorrt.engine_cache import find_platform
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.manifest import MANIFEST_NAME, SPEC_NAME, ParityEntry
from recmas_runtime.formats.precisions import TARGET_NAMES, TARGETS, buildable
from recmas_runtime.running.records import field_option


@click.command()
@SPEC
@SET
@click.option("-o", "--out", type=FILE, help="The bundle's folder [default: out/NAME].")
@click.option(
    "--target",
    type=click.Choice(TARGET_NAMES),
    help="Kind of engine, instead of the spec's build.target.",
)
@click.option(
    "--precision",
    type=click.Choice(buildable()),
    help="How engines hold weights, instead of what the spec says of all backbones.",
)
@click.option("--force", is_flag=True, help="Build even if the bundle is there and current.")
@click.option(
    "--untrained-links",
    "--frozen-links",  # the name of version 0.1
    "untrained",
    is_flag=True,
    help="Give trained links their untrained start instead, to compare with.",
)
@OFFLINE
@DUMP_IR
@QUIET
@command
def build(
    spec: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    dump_ir: Path | None,
    *,
    target: str | None,
    precision: str | None,
    force: bool,
    untrained: bool,
    offline: bool,
    quiet: bool,
) -> Outcome:
    """Export engines, check them against the reference, write a bundle."""
    if target is not None:
        overrides = (*overrides, f"build.target={target}")
    progress = shown_progress(quiet=quiet)
    change = None
    if untrained:
        spec, change = _without_training(spec)
    if precision is not None:
        backbones = load_spec(spec, overrides=overrides).document.backbones
        own = [f"backbones.{name}" for name, each in backbones.items() if each.precision]
        overrides += tuple(f"{path}.precision={precision}" for path in ("build", *own))
    wanted = load_spec(spec, overrides=overrides).document.build.target
    if TARGETS[wanted].machine_engines is not None:
        find_platform()  # before anything is fetched, loaded or exported
    program = load_and_compile(
        spec, overrides, dump_ir=dump_ir, progress=progress, offline=offline, change=change
    )
    name = program.graph.system.name
    folder = out if out is not None else Path("out") / (f"{name}-untrained" if untrained else name)
    program, built = build_bundle(
        program,
        folder,
        progress=progress,
        reuse=not force,
        trained_links=not untrained,
        dump_ir=dump_ir,
    )
    how = "is current" if built.reused else "written"
    reuse = "" if built.reused else f"{Reuse(built.from_cache, built.made).text}\n"
    engines = "" if built.engines is None else f"{built.engines.text}\n"
    bundle = open_bundle(folder)
    chosen = {
        name: list(bundle.plan.links[name].layers or ())
        for name, link in program.graph.system.links.items()
        if link.layer_share is not None and name in bundle.plan.links
    }
    size_bytes = sum(entry.size_bytes for entry in bundle.manifest.files.values())
    load_s = _load_seconds(folder, progress)
    return Outcome(
        text=f"Bundle {folder} {how}.\n{engines}{_losses_note(built.parity, program)}"
        f"{_terms_note(program)}{_trained_note(program)}{_layers_note(chosen)}"
        f"{_parity_note(built.parity)}{reuse}"
        f"Size {human_bytes(size_bytes)}, loads in {load_s:.1f} s.\n"
        f"Next: {_run_command(folder, bundle.plan.fields)}",
        data={
            "engines": None if built.engines is None else built.engines.to_json(),
            "path": str(folder),
            "fingerprint": built.fingerprint,
            "reused": built.reused,
            "from_cache": built.from_cache,
            "made": built.made,
            "seconds": built.seconds,
            "size_bytes": size_bytes,
            "load_seconds": load_s,
            "parity": [to_json(entry) for entry in built.parity],
            "chosen_layers": chosen,
            "trained_links": [] if program.trained is None else list(program.trained.used),
            "untrained_links": _untrained_links(program),
            "held_out": {} if program.trained is None else dict(program.trained.held_out),
        },
        problems=(
            *program.spec.warnings,
            *built.warnings,
            *(() if untrained else _untrained_warning(program)),
        ),
    )


def _load_seconds(folder: Path, progress: Progress) -> float:
    """Return how long a program that answers takes to open the bundle.

    Models behind an API are no part of it: their keys need not be where a bundle is built.
    """
    from recmas_runtime.running.open_engines import load_bundle

    with progress.stage("Opening the bundle"):
        started = time.perf_counter()
        bundle = open_bundle(folder)
        load_bundle(bundle, device="auto", threads=None)
        return time.perf_counter() - started


def _run_command(folder: Path, fields: Sequence[str]) -> str:
    """Return the command that asks a bundle, with what its prompts use."""
    if set(fields) <= {"question"}:
        return f'recmas run {folder} "..."'
    return f"recmas run {folder} " + " ".join(field_option(name, value='"..."') for name in fields)


def _losses_note(parity: Sequence[ParityEntry], program: Program) -> str:
    """Say what the precision of each backbone that is not float32 costs, a line each."""
    backbones = program.graph.system.backbones
    return "".join(
        f"{case.backbone}: {loss_text(case.loss, backbones[case.backbone].precision)}.\n"
        for case in parity
        if case.loss is not None
    )


def _terms_note(program: Program) -> str:
    """Name the terms that come with a model, a line for each model that has some."""
    sources = {b.facts.source for b in program.graph.system.backbones.values()}
    terms = {source: BUILTINS[source].terms for source in sorted(sources & set(BUILTINS))}
    return "".join(f"{source} is under {text}.\n" for source, text in terms.items() if text)


def _parity_note(parity: Sequence[ParityEntry]) -> str:
    """Say how close the engines are to the reference, a line for each case."""
    lines = []
    for case in parity:
        named = (f"{name.removesuffix('_relative')} {x:.0e}" for name, x in case.figures.items())
        greedy = "equal" if case.greedy_tokens_equal else "different"
        lines.append(
            f"{case.backbone} against the reference: {', '.join(named)}; greedy text {greedy}.\n"
        )
    return "".join(lines)


def _layers_note(chosen: Mapping[str, Sequence[int]]) -> str:
    """Say which layers get rows, where the spec says only how many."""
    return "".join(
        f"Layers with the rows of {link}, chosen by attention: {', '.join(map(str, layers))}.\n"
        for link, layers in chosen.items()
    )


def _trained_note(program: Program) -> str:
    """Say which links are trained, and what their messages are worth."""
    trained = program.trained
    if trained is None or not trained.used:
        links = _all_links(program).values()
        # Rows and texts have no weights that could learn.
        is_learned = not links or any(link.file for link in links)
        return f"What messages bring: {'' if is_learned else 'untrained, '}not measured.\n"
    losses = trained.held_out
    told = [
        f"{name} {losses[name]:.3f}" for name in ("latent", "shuffled", "null") if name in losses
    ]
    worth = f"{', '.join(told)} nats per token of held-out answers" if told else "not measured"
    return (
        f"Trained links from {trained.folder}: {', '.join(trained.used)}.\n"
        f"What messages bring: {worth}.\n"
    )


def _untrained_links(program: Program) -> list[str]:
    """Return the links that have learned nothing, by id."""
    started = () if program.trained is None else program.trained.untrained
    links = _all_links(program).items()
    return [name for name, link in links if link.file is None or name in started]


def _untrained_warning(program: Program) -> tuple[Problem, ...]:
    """Warn of links that have learned nothing, however they start."""
    untrained, num_links = _untrained_links(program), len(_all_links(program))
    if not untrained:
        return ()
    named = "" if len(untrained) == num_links else f" ({', '.join(untrained)})"
    verb = "is" if len(untrained) == 1 else "are"
    message = f"{len(untrained)} of {counted(num_links, 'link')} {verb} untrained{named}: "
    message += "thoughts pass, but do not help yet."
    hint = "`recmasc train` trains them, where the spec has a section `train`."
    return (Problem(code="RM152", severity="warning", message=message, hint=hint),)


def _all_links(program: Program) -> dict[str, LinkWeights]:
    """Return all links of a system that are applied, by id, inner ones first."""
    return program.graph.system.link_weights


def _without_training(source: Path) -> tuple[Path, Callable[[Spec], Spec]]:
    """Return the spec file of a spec or a bundle, and what sets its links back to their start."""
    if not (source / MANIFEST_NAME).is_file():
        return source, _untrained
    # The files of a bundle's links are in the bundle, under other names; it knows their kinds.
    kinds = {name: link.kind for name, link in open_bundle(source).manifest.links.items()}
    return source / SPEC_NAME, partial(untrained_links, kinds=kinds)


def _untrained(spec: Spec) -> Spec:
    """Return the spec untrained; links that lie only beside it need not be taken, no more."""
    sections = [agent.inner for agent in spec.document.agents.values()]
    names_files = any(link.weights for link in [*sections, *spec.document.links.values()])
    return spec if has_trained_links(spec) and not names_files else untrained_links(spec)
