"""Whole systems on tiny backbones: YAML to bundle to answers."""

from __future__ import annotations

from pathlib import Path

import pytest

import recmas_runtime as rt
from built import BuildTiny, Built
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pass_base import Pass
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_export.build import build
from tiny_models import write_tiny_backbone
from torch_fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny backbones `llama`, `qwen3` and `gemma3` of different widths."""
    root = tmp_path_factory.mktemp("families")
    for number, family in enumerate(("llama", "qwen3", "gemma3")):
        write_tiny_backbone(root / family, family, seed=number)
    return root


@pytest.fixture(scope="session")
def build_tiny(families: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildTiny:
    """Build a YAML spec whose backbones are folders `llama`, `qwen3`, `gemma3`; once per text."""
    made: dict[tuple[str, str], Built] = {}

    def make(text: str, *, without: tuple[type[Pass], ...] = ()) -> Built:
        key = text, repr(without)
        if key not in made:
            spec = parse_spec(text, file=str(families / "spec.yaml"), base_dir=families)
            topology = build_topology(spec)
            passes = tuple(p for p in PIPELINE if not isinstance(p, without))
            program = run_pipeline(topology, passes=passes)
            bundle = tmp_path_factory.mktemp("bundles") / "bundle"
            build(program, spec=spec, out=bundle)
            made[key] = Built(
                bundle=bundle, topology=topology, program=program, system=rt.load(bundle, threads=1)
            )
        return made[key]

    return make
