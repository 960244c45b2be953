"""What a pass is: a frozen dataclass from graph to graph; and what may watch it run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Level, StepOp
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.ir.verify import verify


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the IR. Its fields are its options, its `repr` its name in the fingerprint.

    A pass never prints, times, dumps or verifies (instruments do), never changes the graph that it
    is given, and returns that graph itself where it has nothing to do.
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


class Instrument(Protocol):
    """Called before and after every pass."""

    def before_pass(self, name: str, graph: Graph) -> None:
        """See the graph that the pass `name` is about to take."""

    def after_pass(self, name: str, graph: Graph) -> None:
        """See the graph that the pass `name` returned."""


class VerifyPasses:
    """Checks the rules of the IR around every pass, not only where the level changes."""

    def before_pass(self, name: str, graph: Graph) -> None:
        """Check what the pass is given."""
        verify(graph, at=f"before {name}")

    def after_pass(self, name: str, graph: Graph) -> None:
        """Check what the pass returned."""
        verify(graph, at=f"after {name}")


class DumpIR:
    """Writes `000_topology.txt`, `001_ShareBackbones.txt`, ... into a folder as passes run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._num_written = 0

    def before_pass(self, name: str, graph: Graph) -> None:
        """Write the graph that the first pass is given."""
        if self._num_written == 0:
            self._write("topology", graph)

    def after_pass(self, name: str, graph: Graph) -> None:
        """Write the graph that the pass returned."""
        self._write(name, graph)

    def _write(self, title: str, graph: Graph) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self._num_written:03}_{title}.txt"
        path.write_text(print_graph(graph), encoding="utf-8")
        self._num_written += 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one pass was given and returned; the same object if it had nothing to do."""

    name: str
    before: Graph
    after: Graph


class RecordPasses:
    """Collects a `Record` per pass in `records`: what `explain` reads."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._before: Graph | None = None

    def before_pass(self, name: str, graph: Graph) -> None:
        """Remember what the pass is given."""
        self._before = graph

    def after_pass(self, name: str, graph: Graph) -> None:
        """Add the record of the pass."""
        assert self._before is not None, "after_pass without before_pass"
        self.records.append(Record(name=name, before=self._before, after=graph))
