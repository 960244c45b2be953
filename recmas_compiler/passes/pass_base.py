"""What a pass is: a frozen dataclass that turns one graph into another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Level, StepOp


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the IR. Its fields are its options, its `repr` its name in the fingerprint.

    A pass never prints, times, dumps or verifies (instruments do), never changes the graph that it
    is given, and returns that graph itself where it has nothing to do.

    Attributes:
        requires: Level of the graph it takes.
        ensures: Level of the graph it returns.
    """

    requires: ClassVar[Level]
    ensures: ClassVar[Level]

    @property
    def name(self) -> str:
        """Its name in logs, dumps and errors."""
        return type(self).__name__

    @abstractmethod
    def __call__(self, graph: Graph) -> Graph:
        """Return the rewritten graph."""


def merge_steps(graph: Graph, merged: Mapping[str, tuple[tuple[str, ...], StepOp]]) -> Graph:
    """Return the program with each group replaced by one step that has all its flows.

    Args:
        graph: A program.
        merged: New id -> (ids of the group, payload of the merged step). Groups are disjoint, and
            no step of a group depends on another one of it.
    """
    renamed = {member: new for new, (members, _) in merged.items() for member in members}
    nodes = {}
    for step, op in graph.nodes().items():
        new = renamed.get(step, step)
        nodes[new] = merged[new][1] if new in merged else op
    flows = {
        (renamed.get(edge.source, edge.source), renamed.get(edge.target, edge.target)): edge.op
        for edge in graph.edges()
    }
    quotient = graph.replaced(
        nodes=nodes, edges=tuple(Edge(*ends, flow) for ends, flow in flows.items())
    )
    # A merged step stands where its first member stood, which may be before what another member
    # waits for; inserting in topological order makes the order of insertion that of execution.
    return quotient.replaced(nodes=dict(quotient.in_order()))
