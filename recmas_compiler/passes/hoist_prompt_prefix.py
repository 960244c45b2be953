"""Loop-invariant motion: what a prompt says again in each round is prefilled once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Flow, Level, NodeOp, Prefill, System
from recmas_compiler.passes.pass_base import Pass


@dataclass(frozen=True)
class HoistPromptPrefix(Pass):
    """Let a Prefill keep cached rows of the same agents' Prefill in an earlier round.

    1. A Prefill reuses the latest earlier Prefill of the same agents. What is kept is the text
       that both prompts begin with, up to the first slot of either; how many tokens that is
       depends on the record and is found at run time.
    2. A layer with a running state instead of rows (linear attention) cannot be set back to the
       end of a prefix: agents on such a backbone recompute their prompts.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with `reuse` set and the cache flowing from round to round."""
        nodes: dict[str, NodeOp] = graph.nodes()
        edges = list(graph.edges())
        latest: dict[tuple[str, ...], str] = {}
        for step, op in graph.in_order():
            if not isinstance(op, Prefill):
                continue
            earlier = latest.get(op.agents)
            if earlier is not None and op.reuse is None and has_rows(graph.system, op):
                nodes[step] = replace(op, reuse=earlier)  # 1
                edges.append(Edge(earlier, step, Flow(carries="cache")))
            latest[op.agents] = step
        if len(edges) == len(graph.edges()):
            return graph
        return graph.replaced(nodes=nodes, edges=tuple(edges))


def has_rows(system: System, op: Prefill) -> bool:
    """Tell whether the cache of a Prefill's backbone has a row for each position, in all layers."""
    return "linear" not in system.backbone_of(op.agents[0]).facts.attention  # 2
