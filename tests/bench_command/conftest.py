"""Measurements of a bundle written by hand, and of a tiny one that the compiler built."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_bundle import write_hand_bundle
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_export.build import build
from tiny_models import write_tiny_backbone
from tiny_specs import SEQUENTIAL
from torch_fixtures import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def hand_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two agents and two rounds that answers a digit with a letter."""
    return write_hand_bundle(tmp_path_factory.mktemp("bundles") / "by-hand")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec of three agents and three rounds, its tiny backbone and its bundle."""
    root = tmp_path_factory.mktemp("project")
    write_tiny_backbone(root / "llama", "llama", seed=0)
    (root / "spec.yaml").write_text(SEQUENTIAL)
    spec = parse_spec(SEQUENTIAL, file=str(root / "spec.yaml"), base_dir=root)
    build(run_pipeline(build_topology(spec)), spec=spec, out=root / "bundle")
    return root
