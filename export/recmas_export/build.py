"""Program to bundle: the one public verb of this package.

Stays light: a bundle that is already there is recognised without importing torch. Its fingerprint
hashes whole texts (the printed program, passes with their options, the resolved spec) and whole
files (weights, the sources of recmas itself), never a hand-kept list of fields that would miss one.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from recmas_compiler.api import BuildResult
from recmas_compiler.backbones.facts import (
    ENGINE_ELEMENT_BYTES,
    angle_tables_bytes,
    row_weights_bytes,
    weights_bytes,
)
from recmas_compiler.backbones.sources import ResolvedSource, resolve_source
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Backbone
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.lowering.plan import live_agents, live_backbones, live_remotes
from recmas_compiler.passes.pipeline import PIPELINE
from recmas_compiler.spec.spec import Spec
from recmas_export.bundle.attachments import (
    corpus_bytes,
    corpus_digest,
    receipts_of,
    write_corpus,
    write_receipts,
)
from recmas_export.bundle.bundle_writer import check_target, staged_bundle
from recmas_export.bundle.engine_files import LINK_ENGINE, PROBE
from recmas_export.cache.build_parts import BuildParts, Reuse
from recmas_export.cache.loaded_backbones import used_backbones
from recmas_export.cache.machine import further_tools, machine
from recmas_runtime.cache.settings import user_store
from recmas_runtime.cache.store import FORMAT
from recmas_runtime.checking.build_tensorrt import build_engines
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.files import clear_away_dead_builds, sha256_of
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.tensorrt.engine_cache import find_platform, timing_caches
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.manifest import MANIFEST_VERSION, Manifest
from recmas_runtime.formats.plan import PLAN_VERSION
from recmas_runtime.formats.precisions import PRECISIONS, TARGETS

if TYPE_CHECKING:
    from recmas_compiler.backbones.torch_model import TorchBackbone
    from recmas_compiler.lowering.materialize import MaterializedLink


# What turns a model into graphs, or runs the graphs that parity is measured with.
TOOLS: Final = (
    "numpy",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "tokenizers",
    "torch",
    "transformers",
)

_UNKNOWN: Final = "unknown"

# What a build depends on beside the code: templates, tables, texts.
_SOURCE_SUFFIXES: Final = frozenset({".json", ".py", ".txt", ".yaml"})

# What a Hugging Face folder may hold that a loaded model depends on.
_MODEL_SUFFIXES: Final = (".jinja", ".json", ".model", ".safetensors", ".txt")


def fingerprint(
    program: Graph,
    *,
    spec_yaml: str,
    backbones: Mapping[str, str],
    links: Mapping[str, str],
    corpus: str | None = None,
    loss_text: str | None = None,
    receipts: Sequence[str] = (),
) -> str:
    """Return the sha256 that identifies a build.

    Digests are of weights, by backbone (see `source_digest`) and by link where there are weights
    before the build; of passages and of the text that losses are measured over, if there are any.
    """
    inputs: dict[str, Any] = {
        "program": print_graph(program),
        "passes": [repr(p) for p in PIPELINE],
        "spec": spec_yaml,
        "backbones": dict(backbones),
        "links": dict(links),
        "corpus": corpus,
        "loss_text": loss_text,
        "receipts": list(receipts),
        "tools": tool_versions(),
        "formats": [MANIFEST_VERSION, PLAN_VERSION],
    }
    return sha256_text(json.dumps(inputs, sort_keys=True))


def source_digest(source: ResolvedSource) -> str:
    """Return a digest over the files that a backbone is loaded from; paths do not count."""
    if source.sha256 is not None:
        return source.sha256  # of the whole file, which may lie in parts
    if source.gguf_path is not None:
        return _digest_of_files([source.gguf_path])
    files = (p for p in source.folder.iterdir() if p.suffix in _MODEL_SUFFIXES and p.is_file())
    return _digest_of_files(sorted(files))


@cache
def tool_versions() -> dict[str, str]:
    """Return the versions of what builds bundles, by name.

    recmas itself counts with its sources and their data files: between releases its version says
    too little.
    """
    own = own_digest("recmas_compiler", "recmas_export")
    versions = {name: _version(name) for name in TOOLS}
    versions["python"] = platform.python_version()
    versions["recmas"] = f"{_version('recmas')}+{own[:12]}"
    return dict(sorted(versions.items()))


@cache
def own_digest(*packages: str) -> str:
    """Return a digest of the sources of recmas's packages and of their data files."""
    own: list[Path] = []
    for package in packages:
        found = find_spec(package)  # by its files, not by importing the package's own door
        assert found is not None
        for folder in found.submodule_search_locations or ():
            own += sorted(p for p in Path(folder).rglob("*") if p.suffix in _SOURCE_SUFFIXES)
    return _digest_of_files(own)


def part_conditions() -> dict[str, object]:
    """Return what every part in the cache depends on beside its inputs.

    That is the code of recmas, the runtime's too, the versions of what it calls, and the machine:
    processors differ in how they round.
    """
    return {
        "format": FORMAT,
        "tools": tool_versions(),
        "further": further_tools(),
        "runtime": own_digest("recmas_runtime"),
        "machine": machine(),
    }


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_files(files: Iterable[Path]) -> str:
    return sha256_text("".join(f"{path.name} {sha256_of(path)}\n" for path in files))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # onnxruntime-gpu provides the same module under another name; a checkout has no metadata.
        return _UNKNOWN


def build(
    program: Graph,
    *,
    spec: Spec,
    out: Path,
    backbones: Mapping[str, TorchBackbone] | None = None,
    links: Mapping[str, MaterializedLink] | None = None,
    progress: Progress | None = None,
    reuse: bool = True,
    cache: bool = True,
) -> BuildResult:
    """Export engines, check them against the reference and write a bundle.

    Target `tensorrt` adds engines for this machine's GPU to the portable ones. What is not given as
    backbones and links, by shared name and by id, is loaded and made. A bundle of this very program
    and these weights is reused if it may be; an older one at `out` is replaced whole.

    Args:
        reuse: Leave a bundle at `out` as it is if it is this very one.
        cache: Take parts that earlier builds have made from the user's cache, and keep there what
            this one makes (docs/building.md). It has no part in builds of given backbones or links.

    Raises:
        RecmasError: RM305 for a cache that cannot be one, RM123 where a search corpus holds what is
            no passage, RM126 where nothing can be predicted in the text to measure losses over,
            RM203 or RM300 where a backbone cannot be exported, RM301 where a tokenizer, a prompt or
            an engine disagrees with the reference or a precision loses too much, RM302 if something
            else is at `out`, RM303 if the disk is full or not writable; for target `tensorrt` also
            RM201, RM504 or RM509, before anything else, if it is not there.
    """
    watcher = progress or Silent()
    target = TARGETS[program.system.build.target]
    if target.machine_engines is not None:
        find_platform()
    with suppress(OSError):  # told where the bundle is written
        clear_away_dead_builds(out.parent, glob.escape(out.name))
    check_target(out)
    kept_timing = timing_caches(out)
    store = user_store() if cache and backbones is None and links is None else None
    started = time.perf_counter()
    with watcher.stage("Hashing weights"):
        inputs = _inputs(program)
        sources = {name: _digest_of_source(each, spec) for name, each in inputs.backbones.items()}
        identity = _fingerprint(inputs, sources, spec=spec, links=links)
    seconds = {"fingerprint": time.perf_counter() - started}
    present = _bundle_with(identity, out) if reuse else None
    manifest, used = present, Reuse({}, {})
    warnings: tuple[Problem, ...] = ()
    if manifest is None:
        with (
            staged_bundle(out, needed_bytes=_estimated_bytes(inputs)) as staged,
            BuildParts(
                store if _are_known(tool_versions()) else None,
                conditions=part_conditions(),
                root=staged.folder,
            ) as made,
        ):
            # Transformers takes most of a second to import, and torch some more.
            from recmas_export.assemble import assemble

            part_sources = _part_sources(program, sources, spec)
            parts = assemble(
                program,
                staged.folder,
                spec=spec,
                names=tuple(inputs.backbones),
                parts=made,
                sources=part_sources,
                backbones=backbones,
                links=links,
                seconds=seconds,
                progress=watcher,
            )
            if inputs.corpus is not None:
                write_corpus(inputs.corpus, staged.folder)
            write_receipts(inputs.receipts, staged.folder)
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
                prompt_digests=parts.prompt_digests,
                token_digests=parts.token_digests,
                layer_scores=parts.layer_scores,
                remotes={
                    name: program.system.remotes[name].entry for name in live_remotes(program)
                },
            )
            started = time.perf_counter()
            with watcher.stage("Writing the bundle"):
                manifest = staged.commit(
                    manifest,
                    plan=parts.plan,
                    spec_yaml=spec.system_yaml(),
                    known=made.digests(),
                )
                used = made.reuse
                if used.made and _part_sources(program, {}, spec) == part_sources:
                    warnings = made.keep(out)  # of what the weights were, and still are
            seconds["write"] = time.perf_counter() - started
    engines = None
    if target.machine_engines is not None:
        engines = build_engines(out, progress=watcher, reuse=reuse, kept_timing=kept_timing)
    return BuildResult(
        path=out,
        fingerprint=identity,
        reused=present is not None,
        parity=manifest.parity,
        seconds=seconds,
        engines=engines,
        from_cache=used.taken,
        made=used.made,
        warnings=warnings,
    )


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What a bundle is made from.

    Attributes:
        backbones: The shared ones that live agents use, by name.
        links: Live agents' inner links and all outer ones, by id; some are read from files.
        loss_text: The text that losses are measured over, where one is read.
    """

    program: Graph
    backbones: Mapping[str, Backbone]
    links: Mapping[str, LinkWeights]
    link_files: Mapping[str, Path]
    receipts: tuple[Path, ...]
    corpus: Path | None
    loss_text: Path | None


def _inputs(program: Graph) -> _Inputs:
    system = program.system
    backbones = {name: system.backbones[name] for name in live_backbones(program)}
    links = {
        inner_link_id(name): inner
        for name in live_agents(program)
        if (inner := system.agents[name].inner) is not None
    }
    links |= {link.id: link.weights for link in system.links.values() if link.weights is not None}
    files = {i: Path(weights.file) for i, weights in links.items() if weights.file is not None}
    measures_loss = any(PRECISIONS[b.precision].has_losses for b in backbones.values())
    return _Inputs(
        program=program,
        backbones=backbones,
        links=links,
        link_files=files,
        receipts=receipts_of(files.values()),
        corpus=None if system.search_corpus is None else Path(system.search_corpus),
        loss_text=Path(system.loss_text) if system.loss_text and measures_loss else None,
    )


def _digest_of_source(backbone: Backbone, spec: Spec) -> str:
    source = backbone.facts.source
    return source_digest(resolve_source(source, base_dir=spec.base_dir, position=backbone.where))


def _part_sources(program: Graph, digests: Mapping[str, str], spec: Spec) -> dict[str, object]:
    """Return what each backbone that agents use is loaded from, by shared name.

    Args:
        digests: Of those that are known.
    """
    return {
        name: {
            "files": digests.get(name) or _digest_of_source(backbone, spec),
            "identity": backbone.facts.identity,
            "dtype": backbone.dtype,
            "template": backbone.template,
        }
        for name, backbone in used_backbones(program).items()
    }


def _are_known(versions: Mapping[str, str]) -> bool:
    """Tell whether all tools have a version: parts made by unknown ones are not to be kept."""
    further = further_tools()
    names = {name for name, version in versions.items() if version == _UNKNOWN}
    other_runtimes = [name for name in further if name.startswith("onnxruntime-") and further[name]]
    return not names - ({"onnxruntime"} if other_runtimes else set())


def _fingerprint(
    inputs: _Inputs,
    sources: Mapping[str, str],
    *,
    spec: Spec,
    links: Mapping[str, MaterializedLink] | None,
) -> str:
    if links is None:
        digests = {link: sha256_of(file) for link, file in inputs.link_files.items()}
    else:
        from recmas_compiler.backbones.torch_model import weights_digest

        digests = {link: weights_digest(made.module) for link, made in links.items()}
    return fingerprint(
        inputs.program,
        spec_yaml=spec.system_yaml(),
        backbones=sources,
        links=digests,
        corpus=None if inputs.corpus is None else corpus_digest(inputs.corpus),
        loss_text=None if inputs.loss_text is None else sha256_of(inputs.loss_text),
        receipts=[sha256_of(receipt) for receipt in inputs.receipts],
    )


def _bundle_with(identity: str, out: Path) -> Manifest | None:
    """Return the manifest of the whole bundle at `out` if it has this fingerprint."""
    try:
        manifest = open_bundle(out).manifest
    except RecmasError:
        return None
    return manifest if manifest.fingerprint == identity else None


def _estimated_bytes(inputs: _Inputs) -> int:
    """Return about how many bytes the bundle takes: weights and tables of angles, most of all."""
    parameters = 0
    for link in inputs.links.values():
        hidden = 2 * link.out_dim  # the widest kind's
        parameters += link.in_dim * hidden + hidden * link.out_dim + link.in_dim * link.out_dim
    num_bytes = ENGINE_ELEMENT_BYTES * parameters
    for backbone in inputs.backbones.values():
        num_bytes += weights_bytes(
            backbone.facts,
            precision=backbone.precision,
            dtype=backbone.dtype,
            device=backbone.device_kind,
        )
        num_bytes += row_weights_bytes(backbone.facts, precision=backbone.precision)
        num_bytes += angle_tables_bytes(backbone.facts)
    return num_bytes + (0 if inputs.corpus is None else corpus_bytes(inputs.corpus))
