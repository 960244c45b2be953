"""Common subexpression elimination for weights: equal backbones become one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level
from recmas_compiler.passes.pass_base import Pass


@dataclass(frozen=True)
class ShareBackbones(Pass):
    """Let backbones with equal weights use one copy and one engine.

    1. Two backbones are equal if their identity (source and revision), their dtype and their
       precision are, and the chat template that the spec gives them.
    2. Of equal backbones the one declared first keeps its weights; the others name it.
    """

    requires = Level.TOPOLOGY
    ensures = Level.TOPOLOGY

    def __call__(self, graph: Graph) -> Graph:
        """Return the topology with `shared_as` set on every backbone."""
        system = graph.system
        owners: dict[tuple[str, ...], str] = {}
        for backbone in system.backbones.values():
            owners.setdefault(backbone.engine_identity, backbone.name)  # 1, 2
        shared = {
            name: replace(backbone, shared_as=owners[backbone.engine_identity])
            for name, backbone in system.backbones.items()
        }
        if shared == system.backbones:
            return graph
        return graph.replaced(system=replace(system, backbones=shared))
