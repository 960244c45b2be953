"""A bundle's system on torch engines: the same plan, prompts and sampler over other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from recmas_compiler.bench.open_torch import Dtype, load_bundle_backbones
from recmas_compiler.bench.torch_engine import TorchEngine
from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.running.open_engines import LoadedBundle, OpenedEngines, read_texts
from recmas_runtime.running.system import System


def load_torch_system(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: Dtype = "float32",
    threads: int | None = None,
    compiled: bool = True,
) -> System:
    """Open a bundle's system with torch engines in the place of its own.

    Weights come from where the bundle's spec says they are. Tools are left out. Without `threads`,
    torch takes its own number.

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
        devices=dict.fromkeys(engines, device),
        provider="cpu",
        problems=[],
    )
    return System(bundle.plan, LoadedBundle.of(bundle, opened, read_texts(bundle)))
