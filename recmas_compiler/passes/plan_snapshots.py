"""Snapshots of layer states, which no smaller write index takes back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level, NodeOp, Prefill, Snapshot, System
from recmas_compiler.passes.pass_base import Pass
from recmas_runtime.formats.layers import has_states, states_bytes


@dataclass(frozen=True)
class PlanSnapshots(Pass):
    """Let a Prefill on a backbone with layer states begin with states that were saved.

    1. Where a Prefill keeps rows of an earlier one, its own agents' or others', that one saves the
       states as they are at the end of what the prompts have in common, and this one restores
       them. Where that end is depends on the record and is found at run time.
    2. A snapshot is named after the agents it is of, and behind `>` those it is for, so that those
       of later rounds take the place of earlier ones: what is restored is the latest one, also
       where an early end has left out rounds.
    3. A backbone that keeps rows only needs none.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with `restore` and `snapshots` set, and the table of snapshots."""
        nodes: dict[str, NodeOp] = graph.nodes()
        table = dict(graph.system.snapshots)
        for step, op in graph.in_order():
            if not isinstance(op, Prefill) or op.rows_of is None or op.restore is not None:
                continue
            if not has_states(graph.system.backbone_of(op.agents[0]).facts.layers):  # 3
                continue
            source = nodes[op.rows_of]
            assert isinstance(source, Prefill)
            made = _snapshot(graph.system, source.agents, op.agents)
            table[made.id] = made
            nodes[op.rows_of] = replace(source, snapshots=(*source.snapshots, made.id))  # 1
            nodes[step] = replace(op, restore=made.id)
        if table == graph.system.snapshots:
            return graph
        return graph.replaced(system=replace(graph.system, snapshots=table), nodes=nodes)


def _snapshot(system: System, agents: tuple[str, ...], used_by: tuple[str, ...]) -> Snapshot:
    name = "+".join(agents)
    layers = system.backbone_of(agents[0]).facts.layers
    return Snapshot(
        id=name if used_by == agents else f"{name}>{'+'.join(used_by)}",  # 2
        agents=agents,
        bytes_per_sample=len(agents) * states_bytes(layers),
    )
