"""Engines for this machine, built into a bundle and checked against its parity cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recmas_runtime.checking.verify import out_of_tolerance, read_case
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.tensorrt.availability import Platform, find_platform
from recmas_runtime.engines.tensorrt.engine_cache import (
    TIMING_CACHE_NAME,
    BackbonePlans,
    DecoderPlan,
    EngineFolder,
    choose_engines,
    staged_engines,
    timing_caches,
    write_record,
)
from recmas_runtime.engines.tensorrt.loading import open_backbones
from recmas_runtime.engines.tensorrt.profiles import (
    ProfileShapes,
    Shapes,
    decoder_ranges,
    head_ranges,
    profile_shapes,
    shapes_of,
)
from recmas_runtime.engines.tensorrt.static_graph import (
    check_readable,
    input_shapes,
    read_graph,
    static_decoder,
)
from recmas_runtime.formats.bundle import ENGINES_FOLDER, Bundle, open_bundle
from recmas_runtime.formats.links import read_operands
from recmas_runtime.formats.manifest import BackboneEntry
from recmas_runtime.formats.safetensors_file import read_tensors
from recmas_runtime.running.parity import measure_backbone_parity

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """What a build of engines gave.

    Attributes:
        path: The folder in the bundle.
        platform: What the engines are good for.
        reused: They were there already; nothing was done.
        capacities: By backbone, the cache capacities that have an engine.
        figures: By backbone, how far the engines are from the reference.
    """

    path: Path
    platform: Platform
    reused: bool
    capacities: dict[str, tuple[int, ...]]
    figures: dict[str, dict[str, float]]

    @property
    def text(self) -> str:
        """What commands print for people."""
        lines = [f"Engines {self.path} {'are current' if self.reused else 'written'}."]
        for name, capacities in self.capacities.items():
            found = ", ".join(
                f"{key} {value:.1e}" for key, value in self.figures.get(name, {}).items()
            )
            sizes = ", ".join(str(capacity) for capacity in capacities)
            lines.append(f"{name}: {sizes} cache rows" + (f"; {found}" if found else ""))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {
            "path": str(self.path),
            "tensorrt": self.platform.tensorrt,
            "architecture": self.platform.architecture,
            "reused": self.reused,
            "capacities": {name: list(rows) for name, rows in self.capacities.items()},
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

    Args:
        root: The bundle.
        progress: Is told about TensorRT's phases.
        reuse: Do nothing if the bundle holds engines for this machine.
        kept_timing: Timing caches by folder name, of a bundle that this one has replaced.

    Raises:
        RecmasError: RM201, RM504 or RM509 if this machine has no TensorRT, before anything else;
            RM203 if TensorRT's parser does not read a graph, RM510 if it builds no engine, RM405 if
            the engines disagree with the reference, RM303 if the bundle cannot be written to.
    """
    platform = find_platform()
    bundle = open_bundle(root)
    path = root / ENGINES_FOLDER / platform.key
    engines, _ = choose_engines(root, bundle.manifest.fingerprint, platform)
    if reuse and engines is not None:
        return EngineBuild(
            path=engines.path,
            platform=platform,
            reused=True,
            capacities=_capacities(engines.record.backbones),
            figures={},
        )
    kept = {**(kept_timing or {}), **timing_caches(root)}
    with staged_engines(root, platform) as folder:
        builder = _Builder(bundle, folder, kept.get(platform.key, b""), progress)
        backbones = {name: builder.build(name) for name in bundle.manifest.backbones}
        (folder / TIMING_CACHE_NAME).write_bytes(builder.timing_cache)
        record = write_record(
            folder,
            fingerprint=bundle.manifest.fingerprint,
            platform=platform,
            backbones=backbones,
        )
        figures = _check(bundle, EngineFolder(folder, record), progress)
    return EngineBuild(
        path=path,
        platform=platform,
        reused=False,
        capacities=_capacities(backbones),
        figures=figures,
    )


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
        entry = self._bundle.manifest.backbones[name]
        shapes = shapes_of(
            self._bundle.plan,
            self._bundle.manifest,
            name,
            case_positions=_case_positions(self._bundle, name),
        )
        decoders = tuple(
            DecoderPlan(capacity=capacity, file=self._build_decoder(name, entry, shapes, capacity))
            for capacity in shapes.capacities
        )
        return BackbonePlans(
            decoders=decoders,
            head=self._build_head(name, entry, shapes),
            max_rows=shapes.max_rows,
            max_groups=shapes.max_groups,
        )

    def _build_decoder(self, name: str, entry: BackboneEntry, shapes: Shapes, capacity: int) -> str:
        path = self._bundle.file(entry.decoder)
        model = static_decoder(read_graph(path), capacity, file=entry.decoder)
        profiles = [
            profile_shapes(input_shapes(model), ranges)
            for ranges in decoder_ranges(shapes, capacity)
        ]
        return self._build(f"{name}.{capacity}", model, path, profiles)

    def _build_head(self, name: str, entry: BackboneEntry, shapes: Shapes) -> str:
        path = self._bundle.file(entry.head)
        model = read_graph(path)
        check_readable(model, file=entry.head)
        profile = profile_shapes(input_shapes(model), head_ranges(shapes))
        return self._build(f"{name}.head", model, path, [profile])

    def _build(
        self, stem: str, model: onnx.ModelProto, path: Path, profiles: Sequence[ProfileShapes]
    ) -> str:
        from recmas_runtime.engines.tensorrt.network import build_plan

        plan, self.timing_cache = build_plan(
            model,
            path,
            profiles,
            timing_cache=self.timing_cache,
            progress=self._progress,
            title=stem,
        )
        file = f"{stem}.plan"
        (self._folder / file).write_bytes(plan)
        return file


def _case_positions(bundle: Bundle, backbone: str) -> int:
    """Return the most positions of a sequence in a backbone's parity cases."""
    longest = 1
    for entry in bundle.manifest.parity:
        if entry.backbone == backbone:
            case, _ = read_tensors(bundle.file(entry.file))
            greedy = len(case["greedy_prompt"]) + len(case["greedy_tokens"])
            longest = max(longest, case["inputs_embeds"].shape[1], greedy)
    return longest


def _capacities(backbones: Mapping[str, BackbonePlans]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(plan.capacity for plan in plans.decoders) for name, plans in backbones.items()
    }


def _check(
    bundle: Bundle, engines: EngineFolder, progress: Progress
) -> dict[str, dict[str, float]]:
    """Run every parity case on the new engines.

    Raises:
        RecmasError: RM405 for figures beyond their tolerance.
    """

    def no_other_engine(entry: BackboneEntry) -> Backbone[Any]:
        raise AssertionError("engines are built large enough for their parity case")

    backbones = open_backbones(bundle, engines, no_other_engine, [])
    operands = read_operands(bundle.file, bundle.manifest.links)
    figures: dict[str, dict[str, float]] = {}
    problems: list[Problem] = []
    with progress.stage("Comparing with the reference", len(bundle.manifest.parity)) as advance:
        for entry in bundle.manifest.parity:
            tensors, inner = read_case(bundle, entry)
            parity = measure_backbone_parity(backbones[entry.backbone], tensors, operands[inner])
            found = figures[entry.backbone] = dict(parity.figures)
            problems += out_of_tolerance(entry.file, found, precision="float32")
            advance()
    if problems:
        raise RecmasError(problems)
    return figures
