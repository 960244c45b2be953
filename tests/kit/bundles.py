"""Bundles of tiny systems as the compiler builds them, beside the same systems in torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from kit.naive import run_naive
from kit.specs import TRIO, TWINS
from recmas_compiler.backbones.torch_model import TorchBackbone, weights_digest
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.named_layers import name_layers
from recmas_compiler.lowering.reference import ReferenceResult, TorchSystem, load_backbones
from recmas_compiler.passes.pass_base import Pass
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.spec.spec import Spec, load_spec, parse_spec
from recmas_export import torch_parts
from recmas_export.build import build
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.safetensors_file import read_tensors


@dataclass(frozen=True, kw_only=True)
class Built:
    """A bundle and the same system in torch, on the bundle's own links."""

    bundle: Path
    topology: Graph
    program: Graph
    system: rt.System

    def _in_torch(self) -> dict[str, dict[str, object]]:
        links = {
            name: load_link(
                self.bundle / entry.file, entry.kind, entry.role, entry.in_dim, entry.out_dim
            )
            for name, entry in self.system.manifest.links.items()
        }
        return {"backbones": load_backbones(self.program, progress=Silent()), "links": links}

    def reference(self, records: list[dict[str, object]]) -> ReferenceResult:
        return TorchSystem(self.program, **self._in_torch()).run(records)

    def naive(self, records: list[dict[str, object]]) -> ReferenceResult:
        limit = self.program.system.sampling.max_new_tokens
        return run_naive(self.topology, records, max_new_tokens=limit, **self._in_torch())


BuildTiny = Callable[..., Built]  # the type of the fixture `build_tiny`


@dataclass(frozen=True)
class _ExportOnce:
    """Copies a backbone's graphs from the first export of equal weights."""

    export: Callable[..., None]
    made_once: MadeOnce

    def __call__(self, backbone: TorchBackbone, folder: Path, **options: object) -> None:
        config = {k: v for k, v in backbone.model.config.to_dict().items() if k != "_name_or_path"}
        facts = replace(backbone.facts, source="", identity="", folder=None)
        texts = backbone.tokenizer_json, backbone.chat_template
        weights = weights_digest(backbone.model)
        made = self.made_once(
            repr((weights, config, facts, texts, backbone.dtype, options)),
            lambda new: self.export(backbone, new / "graphs", **options),
        )
        shutil.copytree(made / "graphs", folder, dirs_exist_ok=True)


@contextmanager
def each_backbone_exported_once(made_once: MadeOnce) -> Iterator[None]:
    """Within it builds export a backbone only if no build of this test run has done so.

    Nearly all of a build's time goes into exports, and they depend on the backbone and the
    precision alone; the rest of a build is done as ever. `tests/export` exports for itself.
    """
    if isinstance(torch_parts.export_backbone, _ExportOnce):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        once = _ExportOnce(torch_parts.export_backbone, made_once)
        patch.setattr(torch_parts, "export_backbone", once)
        yield


def tiny_builder(folder: Path, made_once: MadeOnce, new_bundle: Callable[[], Path]) -> BuildTiny:
    """Return what builds a YAML text once, its backbones in `folder` unless told otherwise."""
    made: dict[str, Built] = {}

    def make(
        text: str,
        *,
        without: tuple[type[Pass], ...] = (),
        base_dir: Path = folder,
        out: Path | None = None,
    ) -> Built:
        key = repr((text, without, base_dir, out))
        if key not in made:
            spec = parse_spec(text, file=str(base_dir / "spec.yaml"), base_dir=base_dir)
            topology = build_topology(spec)
            passes = tuple(p for p in PIPELINE if not isinstance(p, without))
            program = run_pipeline(topology, passes=passes)
            bundle = out or new_bundle()
            with each_backbone_exported_once(made_once):
                build(program, spec=spec, out=bundle)
            system = rt.load(bundle, threads=1)
            made[key] = Built(
                bundle=bundle,
                topology=topology,
                program=name_layers(program, system.manifest.layer_scores),
                system=system,
            )
        return made[key]

    return make


def compile_system(path: Path, *overrides: str) -> tuple[Spec, Graph]:
    """Return a spec file's spec and program."""
    spec = load_spec(path, overrides=overrides)
    return spec, run_pipeline(build_topology(spec))


def write_twins(folder: Path) -> Path:
    """Write the spec `TWINS` and its two backbones, one layer and two; returns the spec's path."""
    return _write_system(folder, TWINS, num_hidden_layers=1)


def write_trio(folder: Path) -> Path:
    """Write the spec `TRIO` and its two backbones of two layers; returns the spec's path."""
    return _write_system(folder, TRIO, num_hidden_layers=2)


def _write_system(folder: Path, text: str, *, num_hidden_layers: int) -> Path:
    models = folder / "models"
    write_tiny_backbone(models / "small", "llama", num_hidden_layers=num_hidden_layers)
    write_tiny_backbone(
        models / "other",
        "gemma3",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size=48,
    )
    path = folder / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def num_weight_bytes(path: Path) -> int:
    """Bytes of a weights file without its tables of angles, which have no precision."""
    tensors, _ = read_tensors(path)
    tables = sum(t.nbytes for name, t in tensors.items() if name.endswith(".table"))
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - tables
