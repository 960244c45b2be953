"""Engines for this machine, built into a bundle and checked against its parity cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas_runtime.checking.parity import case_positions, measure_backbone_parity
from recmas_runtime.checking.verify import out_of_tolerance, read_case
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.tensorrt.engine_cache import (
    RECORD_NAME,
    TIMING_CACHE_NAME,
    BackbonePlans,
    DecoderPlan,
    EngineFolder,
    EngineRecord,
    choose_engines,
    find_platform,
    staged_engines,
    timing_caches,
    write_record,
)
from recmas_runtime.engines.tensorrt.own_engines import remember_engines
from recmas_runtime.engines.tensorrt.static_graph import (
    Ranges,
    decoder_ranges,
    head_ranges,
    input_shapes,
    profile_shapes,
    read_graph,
    shapes_of,
    static_decoder,
)
from recmas_runtime.formats.bundle import ENGINES_FOLDER, Bundle, open_bundle
from recmas_runtime.formats.links import read_operands
from recmas_runtime.formats.precisions import AUTO, TENSORRT, device_named

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """What a build gave; `figures` say by backbone how far its engines are from the reference.

    Where the user has no folder to remember them in, they are not taken without being asked for.
    """

    path: Path
    record: EngineRecord
    reused: bool
    figures: dict[str, dict[str, float]]
    is_own: bool = True

    @property
    def capacities(self) -> dict[str, list[int]]:
        """By backbone, the cache capacities that have an engine."""
        backbones = self.record.backbones
        return {name: [plan.capacity for plan in backbones[name].decoders] for name in backbones}

    @property
    def text(self) -> str:
        """What commands print for people."""
        lines = [f"Engines {self.path} {'are current' if self.reused else 'written'}."]
        for name, capacities in self.capacities.items():
            figures = self.figures.get(name, {})
            found = ", ".join(f"{key} {value:.1e}" for key, value in figures.items())
            sizes = ", ".join(str(capacity) for capacity in capacities)
            lines.append(f"{name}: {sizes} cache rows" + (f"; {found}" if found else ""))
        if not self.is_own:
            lines.append("The user's state folder cannot be written: run with --device tensorrt.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {
            "path": str(self.path),
            "tensorrt": self.record.tensorrt,
            "architecture": self.record.architecture,
            "reused": self.reused,
            "capacities": self.capacities,
            "figures": self.figures,
        }


def build_engines(
    root: Path,
    *,
    progress: Progress,
    reuse: bool = True,
    kept_timing: Mapping[str, bytes] | None = None,
) -> EngineBuild:
    """Build TensorRT engines for this machine into a bundle.

    The engines take their place only after they have passed the bundle's parity cases; an older set
    for the same machine stays until then, and goes when they are there.
    With `reuse` nothing is done where the bundle holds such engines. Of a bundle that this one has
    replaced, `kept_timing` are the timing caches by folder name.

    Raises:
        RecmasError: RM201, RM504 or RM509 if this machine has no TensorRT, before anything else;
            RM203 if TensorRT's parser does not read a graph, RM510 if it builds no engine, RM405 if
            the engines disagree with the reference, RM303 if the bundle cannot be written to.
    """
    platform = find_platform()
    bundle = open_bundle(root)
    fingerprint, entries = bundle.manifest.fingerprint, bundle.manifest.backbones
    engines, _ = choose_engines(root, fingerprint, platform)
    if reuse and engines is not None and engines.is_own:
        return EngineBuild(path=engines.path, record=engines.record, reused=True, figures={})
    kept = {**(kept_timing or {}), **timing_caches(root)}
    with staged_engines(root, platform) as folder:
        builder = _Builder(bundle, folder, kept.get(platform.key, b""), progress)
        # What the spec has placed elsewhere runs there.
        placed = {name: device_named(e.device).kind for name, e in entries.items()}
        backbones = {
            name: builder.build(name) for name in entries if placed[name] in (AUTO, TENSORRT)
        }
        (folder / TIMING_CACHE_NAME).write_bytes(builder.timing_cache)
        record = write_record(
            folder, fingerprint=fingerprint, platform=platform, backbones=backbones
        )
        figures = _check(bundle, EngineFolder(folder, record), progress)
    path = root / ENGINES_FOLDER / platform.key
    is_own = remember_engines(path / RECORD_NAME)
    return EngineBuild(path=path, record=record, reused=False, figures=figures, is_own=is_own)


class _Builder:
    """Builds plans into a folder; what one build measures, the next one knows."""

    def __init__(
        self, bundle: Bundle, folder: Path, timing_cache: bytes, progress: Progress
    ) -> None:
        self.timing_cache = timing_cache
        self._bundle = bundle
        self._folder = folder
        self._progress = progress

    def build(self, name: str) -> BackbonePlans:
        """Build a backbone's decoders, one for each capacity, and its head."""
        bundle = self._bundle
        entry = bundle.manifest.backbones[name]
        positions = _case_positions(bundle, name)
        shapes = shapes_of(bundle.plan, bundle.manifest, name, case_positions=positions)
        decoder, head = read_graph(bundle.file(entry.decoder)), read_graph(bundle.file(entry.head))
        decoders = []
        for capacity in shapes.capacities:
            model = static_decoder(decoder, capacity, file=entry.decoder)
            ranges = decoder_ranges(shapes, capacity)
            file = self._write(f"{name}.{capacity}", model, entry.decoder, ranges)
            decoders.append(DecoderPlan(capacity=capacity, file=file))
        return BackbonePlans(
            decoders=tuple(decoders),
            head=self._write(f"{name}.head", head, entry.head, (head_ranges(shapes),)),
            max_rows=shapes.max_rows,
            max_groups=shapes.max_groups,
        )

    def _write(
        self, stem: str, model: onnx.ModelProto, source: str, ranges: Sequence[Ranges]
    ) -> str:
        from recmas_runtime.engines.tensorrt.network import serialize_engine

        inputs = input_shapes(model)
        engine, self.timing_cache = serialize_engine(
            model,
            self._bundle.file(source),
            [profile_shapes(inputs, each) for each in ranges],
            timing_cache=self.timing_cache,
            progress=self._progress,
            title=stem,
        )
        file = f"{stem}.plan"
        (self._folder / file).write_bytes(engine)
        return file


def _case_positions(bundle: Bundle, backbone: str) -> int:
    """Return the most positions of a sequence in a backbone's parity cases."""
    cases = (read_case(bundle, e)[0] for e in bundle.manifest.parity if e.backbone == backbone)
    return max(map(case_positions, cases), default=1)


def _check(
    bundle: Bundle, engines: EngineFolder, progress: Progress
) -> dict[str, dict[str, float]]:
    """Run every parity case on the new engines; RM405 for figures beyond their tolerance."""
    from recmas_runtime.engines.tensorrt.backbone import open_backbones

    def no_other_engine(name: str) -> Backbone[Any]:
        raise AssertionError("engines are built large enough for their parity case")

    built = list(engines.record.backbones)
    backbones = open_backbones(bundle, engines, built, no_other_engine, [])
    operands = read_operands(bundle.file, bundle.manifest.links)
    figures: dict[str, dict[str, float]] = {}
    problems: list[Problem] = []
    cases = [entry for entry in bundle.manifest.parity if entry.backbone in built]
    with progress.stage("Comparing with the reference", len(cases)) as advance:
        for entry in cases:
            tensors, inner = read_case(bundle, entry)
            parity = measure_backbone_parity(backbones[entry.backbone], tensors, operands[inner])
            found = figures[entry.backbone] = dict(parity.figures)
            precision = bundle.manifest.backbones[entry.backbone].precision
            problems += out_of_tolerance(entry.file, found, precision=precision)
            advance()
    if problems:
        raise RecmasError(problems)
    return figures
