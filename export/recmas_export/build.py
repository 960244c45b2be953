"""Program to bundle: the one public verb of this package.

Stays light: a bundle that is already there is recognised without importing torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from recmas_compiler.api import BuildResult
from recmas_compiler.backbones.sources import resolve_source
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import SEARCH_CORPUS, LinkWeights
from recmas_compiler.ir.sizes import (
    ENGINE_DTYPE,
    QUANTIZED,
    angle_tables_bytes,
    dtype_bytes,
    weights_bytes,
)
from recmas_compiler.lowering.plan import build_plan, live_agents, live_backbones
from recmas_compiler.spec.spec import Spec
from recmas_export.bundle_writer import check_target, staged_bundle
from recmas_export.fingerprint import fingerprint, source_digest, tool_versions
from recmas_export.search_corpus import corpus_lines
from recmas_export.training_receipt import receipts_of, write_receipts
from recmas_runtime.checking.build_tensorrt import build_engines
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.tensorrt.engine_cache import find_platform, timing_caches
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.manifest import Manifest

if TYPE_CHECKING:
    from recmas_compiler.backbones.torch_model import TorchBackbone
    from recmas_compiler.lowering.materialize import MaterializedLink


def build(
    program: Graph,
    *,
    spec: Spec,
    out: Path,
    backbones: Mapping[str, TorchBackbone] | None = None,
    links: Mapping[str, MaterializedLink] | None = None,
    progress: Progress | None = None,
    reuse: bool = True,
) -> BuildResult:
    """Export engines, check them against the reference and write a bundle.

    Target `tensorrt` adds engines for this machine's GPU to the portable ones.

    Args:
        program: Of level PLANNED.
        spec: What it was compiled from.
        out: The bundle's folder; an older bundle there is replaced whole.
        backbones: Loaded already, by shared name; None loads them.
        links: Materialized already, by id; None makes them.
        progress: Where stages are reported.
        reuse: Return at once if `out` holds the bundle of this very program and these weights.

    Raises:
        RecmasError: RM123 where a search corpus holds what is no passage, RM126 where nothing can
            be predicted in the text to measure losses over, RM203 or RM300 where a backbone cannot
            be exported, RM301 where an engine disagrees with the reference or a precision loses too
            much, RM302 if something else is at `out`, RM303 if the disk is full or not writable;
            for target `tensorrt` also RM201, RM504 or RM509, before anything else, if it is not
            there.
    """
    watcher = progress or Silent()
    if program.system.build.target == "tensorrt":
        find_platform()
    check_target(out)
    kept_timing = timing_caches(out)
    result = _build_portable(
        program,
        spec=spec,
        out=out,
        backbones=backbones,
        links=links,
        watcher=watcher,
        reuse=reuse,
    )
    if program.system.build.target != "tensorrt":
        return result
    engines = build_engines(out, progress=watcher, reuse=reuse, kept_timing=kept_timing)
    return replace(result, engines=engines)


def _build_portable(
    program: Graph,
    *,
    spec: Spec,
    out: Path,
    backbones: Mapping[str, TorchBackbone] | None,
    links: Mapping[str, MaterializedLink] | None,
    watcher: Progress,
    reuse: bool,
) -> BuildResult:
    """Write the bundle that runs anywhere."""
    started = time.perf_counter()
    with watcher.stage("Hashing weights"):
        identity = _fingerprint(program, spec=spec, links=links)
    seconds = {"fingerprint": time.perf_counter() - started}
    if reuse and (present := _bundle_with(identity, out)) is not None:
        return BuildResult(
            path=out, fingerprint=identity, reused=True, parity=present.parity, seconds=seconds
        )
    plan = build_plan(program)
    receipts = receipts_of(_link_files(program).values())
    with staged_bundle(out, needed_bytes=_estimated_bytes(program)) as staged:
        # Torch and transformers take seconds to import.
        from recmas_export.assemble import LINK_ENGINE, PROBE, assemble

        parts = assemble(
            program,
            plan,
            staged.folder,
            backbones=backbones,
            links=links,
            progress=watcher,
        )
        _write_corpus(program.system.search_corpus, staged.folder)
        write_receipts(receipts, staged.folder)
        manifest = Manifest(
            name=program.system.name,
            fingerprint=identity,
            spec_digest=spec.digest,
            precision=program.system.build.precision,
            tools=tool_versions(),
            backbones=parts.backbones,
            links=parts.links,
            link_engine=LINK_ENGINE,
            probe=PROBE,
            parity=parts.parity,
            files={},
        )
        started = time.perf_counter()
        with watcher.stage("Writing the bundle"):
            staged.commit(manifest, plan=plan, spec_yaml=spec.system_yaml())
        seconds |= {**parts.seconds, "write": time.perf_counter() - started}
    return BuildResult(
        path=out, fingerprint=identity, reused=False, parity=parts.parity, seconds=seconds
    )


def _fingerprint(
    program: Graph, *, spec: Spec, links: Mapping[str, MaterializedLink] | None
) -> str:
    sources = {}
    for name in live_backbones(program):
        backbone = program.system.backbones[name]
        resolved = resolve_source(
            backbone.facts.source, base_dir=spec.base_dir, position=backbone.where
        )
        sources[name] = source_digest(resolved)
    if links is None:
        digests = {i: sha256_of(Path(file)) for i, file in _link_files(program).items()}
    else:
        from recmas_compiler.backbones.torch_model import weights_digest

        digests = {i: weights_digest(link.module) for i, link in links.items()}
    return fingerprint(
        program,
        spec_yaml=spec.system_yaml(),
        backbones=sources,
        links=digests,
        corpus=_corpus_digest(program.system.search_corpus),
        loss_text=_loss_text_digest(program),
        receipts=[sha256_of(receipt) for receipt in receipts_of(_link_files(program).values())],
    )


def _loss_text_digest(program: Graph) -> str | None:
    """Return the sha256 of the text that losses are measured over, where there are any."""
    text = program.system.loss_text
    backbones = (program.system.backbones[name] for name in live_backbones(program))
    is_read = text is not None and any(b.precision in QUANTIZED for b in backbones)
    return sha256_of(Path(text)) if text is not None and is_read else None


def _corpus_digest(corpus: str | None) -> str | None:
    """Return the sha256 of the passages as the bundle will have them, all of them checked."""
    if corpus is None:
        return None
    digest = hashlib.sha256()
    for line in corpus_lines(Path(corpus)):
        digest.update(line.encode())
    return digest.hexdigest()


def _write_corpus(corpus: str | None, folder: Path) -> None:
    if corpus is None:
        return
    path = folder / SEARCH_CORPUS
    path.parent.mkdir()
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(corpus_lines(Path(corpus)))


def _bundle_with(identity: str, out: Path) -> Manifest | None:
    """Return the manifest of the whole bundle at `out` if it has this fingerprint."""
    try:
        manifest = open_bundle(out).manifest
    except RecmasError:
        return None
    return manifest if manifest.fingerprint == identity else None


def _links(program: Graph) -> dict[str, LinkWeights]:
    system = program.system
    inner = {f"{name}.inner": system.agents[name].inner for name in live_agents(program)}
    return {**inner, **{link.id: link.weights for link in system.links.values()}}


def _link_files(program: Graph) -> dict[str, str]:
    """Return the files that links are read from, by link id."""
    files = {link_id: weights.file for link_id, weights in _links(program).items()}
    return {link_id: file for link_id, file in files.items() if file is not None}


def _estimated_bytes(program: Graph) -> int:
    """Return about how many bytes the bundle takes: weights and tables of angles, most of all."""
    backbones = [program.system.backbones[name] for name in live_backbones(program)]
    weights = sum(weights_bytes(b.facts, precision=b.precision, dtype=b.dtype) for b in backbones)
    tables = sum(angle_tables_bytes(b.facts) for b in backbones)
    parameters = 0
    for link in _links(program).values():
        hidden = 2 * link.out_dim  # the widest kind's
        parameters += link.in_dim * hidden + hidden * link.out_dim + link.in_dim * link.out_dim
    return (
        weights
        + tables
        + dtype_bytes(ENGINE_DTYPE) * parameters
        + _corpus_bytes(program.system.search_corpus)
    )


def _corpus_bytes(corpus: str | None) -> int:
    """Return the bytes of a corpus as it is found; in the bundle it takes about as many."""
    if corpus is None:
        return 0
    path = Path(corpus)
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
