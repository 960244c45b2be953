"""A bundle beside the same system in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import recmas_runtime as rt
from kit.naive import run_naive
from recmas_compiler.ir.graph import Graph
from recmas_compiler.links.modules import load_link
from recmas_compiler.lowering.reference import ReferenceResult, TorchSystem, load_backbones
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


BuildTiny = Callable[..., Built]


def num_weight_bytes(path: Path) -> int:
    """Bytes of a weights file without its tables of angles, which have no precision."""
    tensors, _ = read_tensors(path)
    tables = sum(t.nbytes for name, t in tensors.items() if name.endswith(".table"))
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    return path.stat().st_size - header - tables
