"""The Python door: spec -> program -> torch module or bundle.

Torch, transformers and ONNX are imported only by the functions that need them, so that checking a
spec stays fast and works where they are not installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.instruments import DumpIR, Instrument, Record, RecordPasses
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.links.trained import End, TrainedLinks, find_trained_links
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.progress import Progress, Silent

if TYPE_CHECKING:
    from recmas_compiler.lowering.reference import TorchSystem


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled system: its spec, its topology, and the program after all passes.

    Attributes:
        spec: What it was compiled from.
        topology: The declared graph.
        graph: The unrolled program; `print(program)` shows it.
        records: The graph before and after every pass, in order.
    """

    spec: Spec
    topology: Graph
    graph: Graph
    records: tuple[Record, ...]

    def __str__(self) -> str:
        return print_graph(self.graph)


def compile(spec: Spec, *, dump_ir: str | Path | None = None, download: bool = False) -> Program:
    """Lower a spec to the program IR, through all passes; no weights are loaded.

    Args:
        spec: A checked spec.
        download: Fetch what is missing of `hf:` backbones.
        dump_ir: Folder to write the IR's text to after every pass.

    Raises:
        RecmasError: Backbone files that are missing or unsuitable (RM2xx), link files that do not
            fit (RM120), and every other finding that needs the backbones' dimensions.
    """
    topology = build_topology(spec, download=download)
    recorder = RecordPasses()
    instruments: tuple[Instrument, ...] = (recorder,)
    if dump_ir is not None:
        instruments += (DumpIR(Path(dump_ir)),)
    graph = run_pipeline(topology, instruments=instruments)
    return Program(spec=spec, topology=topology, graph=graph, records=tuple(recorder.records))


def trained_links(program: Program) -> TrainedLinks | None:
    """Return what `recmasc train` left beside a program's spec, and the spec that uses it."""
    system = program.graph.system
    facts = {name: system.backbone_of(name).facts for name in system.agents}
    ends = {name: End(width=f.width, identity=f.identity) for name, f in facts.items()}
    return find_trained_links(program.spec, ends)


def to_torch(program: Program) -> TorchSystem:
    """Return the program as an `nn.Module` that runs it eagerly: the reference of every engine."""
    from recmas_compiler.lowering.reference import to_torch as lower

    return lower(program.graph)


def build(
    program: Program, out: str | Path, *, progress: Progress | None = None, reuse: bool = True
) -> Path:
    """Export engines, check them against the reference and write a bundle; returns its folder.

    Args:
        program: From `compile`.
        out: The bundle's folder. An older bundle there is replaced in one rename.
        progress: Where to report stages to.
        reuse: Return at once if `out` already holds the bundle of this very program.

    Raises:
        RecmasError: RM301 if an engine disagrees with the reference, RM302 if `out` is in the way,
            RM303 if the disk is full.
    """
    from recmas_export.build import build as export

    result = export(
        program.graph,
        spec=program.spec,
        out=Path(out),
        progress=progress or Silent(),
        reuse=reuse,
    )
    return result.path
