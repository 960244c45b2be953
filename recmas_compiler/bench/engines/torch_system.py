"""A bundle's system on torch engines: the same plan and executor, other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.engines.eager_engines import CachedEngine, RecomputingEngine
from recmas_compiler.bench.engines.torch_engine import TorchEngine
from recmas_compiler.bench.engines.torch_tables import TorchTables
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.links.untrained import without_link_files
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import load_spec
from recmas_runtime.core.progress import Silent
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.formats.bundle import inside, open_bundle
from recmas_runtime.formats.manifest import SPEC_NAME
from recmas_runtime.running.open_engines import OpenedEngines
from recmas_runtime.running.system import System, load_machinery

Dtype = Literal["float32", "bfloat16", "float16"]

KINDS: Final[dict[str, type[TorchTables]]] = {
    "torch": TorchEngine,
    "huggingface": CachedEngine,
    "naive": RecomputingEngine,
}
# What each device computes in fastest without a change of the weights' meaning.
DTYPES: Final[dict[str, Dtype]] = {"cpu": "float32", "cuda": "bfloat16"}


def load_torch_system(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
    threads: int | None = None,
    compiled: bool = True,
) -> System:
    """Open a bundle's system with torch engines in the place of its own.

    Weights come from where the bundle's spec says they are. Tools are left out.

    Args:
        path: The bundle's folder.
        device: `cpu` or `cuda`.
        dtype: Element type of weights, activations and caches.
        threads: Threads within an operator; None takes torch's own number.
        compiled: As in `TorchEngine`.

    Raises:
        RecmasError: As `recmas_runtime.load`, and RM2xx for backbones that are not there.
    """
    bundle = open_bundle(path)
    if threads is not None:
        torch.set_num_threads(threads)
    engines = {
        name: TorchEngine(backbone, device=device, dtype=getattr(torch, dtype), compiled=compiled)
        for name, backbone in load_bundle_backbones(bundle.root).items()
    }
    opened = OpenedEngines(
        # Of an entry, the executor asks for dimensions only, and the compiler's facts have those.
        backbones=cast("dict[str, Backbone[Any]]", engines),
        link=LinkEngine(bundle.file(bundle.manifest.link_engine), threads=threads),
        device=device,
        provider="cpu",
        problems=[],
    )
    return System(bundle.plan, load_machinery(bundle, opened))


def open_torch_engine(
    root: Path, backbone: str, *, kind: str, device: str, threads: int
) -> tuple[TorchTables, Dtype, int]:
    """Open one backbone of a bundle in torch.

    Args:
        root: The bundle's folder.
        backbone: Its name in the manifest.
        kind: One of `KINDS`.
        device: `cpu` or `cuda`.
        threads: Threads within an operator.

    Returns:
        The engine, its element type, and the bytes of weights that a step of it reads.
    """
    torch.set_num_threads(threads)
    loaded = load_bundle_backbones(root)[backbone]
    dtype = DTYPES[device]
    # Counted before packing, which changes their form but not their size.
    table = loaded.embedding.weight
    elements = sum(p.numel() for p in loaded.body.parameters() if p is not table)
    engine = KINDS[kind](loaded, device=device, dtype=getattr(torch, dtype))
    return engine, dtype, elements * getattr(torch, dtype).itemsize


def load_bundle_backbones(root: Path) -> dict[str, TorchBackbone]:
    """Load the backbones that a bundle was built from, by their names in its manifest."""
    # Links are the bundle's own; the files they once came from may be gone.
    spec = without_link_files(load_spec(inside(root, SPEC_NAME)), lambda *_: "projected")
    return load_backbones(run_pipeline(build_topology(spec)), progress=Silent())
