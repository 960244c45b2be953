"""`recmasc build`: a bundle, with the trained links that lie beside the spec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from recmas_cli.console import DUMP_IR, FILE, QUIET, SET, SPEC, Outcome, command, shown_progress
from recmas_compiler.api import Program, build_bundle, load_and_compile
from recmas_compiler.links.trained import has_trained_links, untrained_links
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_runtime.cli.inspect import loss_text
from recmas_runtime.engines.tensorrt.engine_cache import find_platform
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.manifest import MANIFEST_NAME, SPEC_NAME, ParityEntry
from recmas_runtime.formats.precisions import TARGET_NAMES, TARGETS
from recmas_runtime.running.records import run_command


@click.command()
@SPEC
@SET
@click.option("-o", "--out", type=FILE, help="The bundle's folder [default: out/NAME].")
@click.option(
    "--target",
    type=click.Choice(TARGET_NAMES),
    help="Kind of engine, instead of the spec's build.target.",
)
@click.option("--force", is_flag=True, help="Build even if the bundle is there and current.")
@click.option(
    "--untrained-links",
    "--frozen-links",  # the name of version 0.1
    "untrained",
    is_flag=True,
    help="Give trained links their untrained start instead, to compare with.",
)
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
    force: bool,
    untrained: bool,
    quiet: bool,
) -> Outcome:
    """Export engines, check them against the reference, write a bundle."""
    if target is not None:
        overrides = (*overrides, f"build.target={target}")
    progress = shown_progress(quiet=quiet)
    change = None
    if untrained:
        spec, change = _without_training(spec)
    wanted = load_spec(spec, overrides=overrides).document.build.target
    if TARGETS[wanted].machine_engines is not None:
        find_platform()  # before anything is fetched, loaded or exported
    program = load_and_compile(spec, overrides, dump_ir=dump_ir, progress=progress, change=change)
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
    engines = "" if built.engines is None else f"{built.engines.text}\n"
    return Outcome(
        text=f"Bundle {folder} {how}.\n{engines}{_losses_note(built.parity, program)}"
        f"{_links_note(program)}"
        f"Next: {run_command(str(folder), open_bundle(built.path).plan.fields)}",
        data={
            "engines": None if built.engines is None else built.engines.to_json(),
            "path": str(folder),
            "fingerprint": built.fingerprint,
            "reused": built.reused,
            "seconds": built.seconds,
            "parity": [to_json(entry) for entry in built.parity],
            "trained_links": [] if program.trained is None else list(program.trained.used),
        },
        problems=program.spec.warnings,
    )


def _losses_note(parity: Sequence[ParityEntry], program: Program) -> str:
    """Say what the precision of each backbone that is not float32 costs, a line each."""
    backbones = program.graph.system.backbones
    return "".join(
        f"{case.backbone}: {loss_text(case.loss, backbones[case.backbone].precision)}.\n"
        for case in parity
        if case.loss is not None
    )


def _links_note(program: Program) -> str:
    """Say which links are trained, and which are not."""
    system, trained = program.graph.system, program.trained
    weights = {inner_link_id(name): agent.inner for name, agent in system.agents.items()}
    weights |= {link_id: link.weights for link_id, link in system.links.items()}
    started = () if trained is None else trained.untrained
    untrained = [name for name, link in weights.items() if link.file is None or name in started]
    note = ""
    if trained is not None and trained.used:
        note = f"Trained links from {trained.folder}: {', '.join(trained.used)}.\n"
    if untrained:
        named = f" ({', '.join(untrained)})" if note else ""
        note += f"{len(untrained)} of {len(weights)} links are untrained{named}: thoughts pass, "
        note += "but do not help yet.\n"
    return note


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
