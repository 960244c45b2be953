"""The one file that knows networkx: an immutable graph with one op per node and edge; routing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

import networkx as nx

from recmas_compiler.ir.ops import EdgeOp, Level, NodeOp, PromptOp, Send, System, is_answer
from recmas_runtime.formats.ids import outer_link_id
from recmas_runtime.formats.plan import Message, SentMessage

SWEEPS = 8  # of ordering layers by their neighbours; they settle in two or three


@dataclass(frozen=True)
class Edge:
    """A directed edge with its payload."""

    source: str
    target: str
    op: EdgeOp


class Graph:
    """A topology or a program: nodes by string id, deterministic order, never changed in place.

    Args:
        edges: Endpoints must be nodes. At most one edge per ordered pair.
    """

    def __init__(
        self, *, level: Level, system: System, nodes: Mapping[str, NodeOp], edges: tuple[Edge, ...]
    ) -> None:
        graph: nx.DiGraph[str] = nx.DiGraph()
        for node_id in nodes:
            graph.add_node(node_id, op=nodes[node_id])
        for edge in edges:
            assert edge.source in nodes, f"edge from unknown node {edge.source!r}"
            assert edge.target in nodes, f"edge to unknown node {edge.target!r}"
            assert not graph.has_edge(edge.source, edge.target), f"two edges {edge}"
            graph.add_edge(edge.source, edge.target, op=edge.op)
        self._graph = graph
        self.level = level
        self.system = system

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._graph

    def __len__(self) -> int:
        return len(self._graph)

    def op(self, node_id: str) -> NodeOp:
        """Return the payload of a node."""
        op: NodeOp = self._graph.nodes[node_id]["op"]
        return op

    def nodes(self) -> dict[str, NodeOp]:
        """Return payloads by id in the order of insertion."""
        return {node_id: self.op(node_id) for node_id in self._graph}

    def edges(self) -> tuple[Edge, ...]:
        """Return all edges in the order of insertion by source."""
        return tuple(Edge(s, t, data["op"]) for s, t, data in self._graph.edges(data=True))

    def edge(self, source: str, target: str) -> EdgeOp | None:
        """Return the payload of an edge, or None if there is none."""
        if not self._graph.has_edge(source, target):
            return None
        op: EdgeOp = self._graph.edges[source, target]["op"]
        return op

    def predecessors(self, node_id: str) -> tuple[str, ...]:
        """Return the sources of a node's incoming edges, sorted."""
        return tuple(sorted(self._graph.predecessors(node_id)))

    def successors(self, node_id: str) -> tuple[str, ...]:
        """Return the targets of a node's outgoing edges, sorted."""
        return tuple(sorted(self._graph.successors(node_id)))

    def ancestors(self, node_id: str) -> frozenset[str]:
        """Return every node from which `node_id` can be reached."""
        return frozenset(nx.ancestors(self._graph, node_id))

    def descendants(self, node_id: str) -> frozenset[str]:
        """Return every node that can be reached from `node_id`."""
        return frozenset(nx.descendants(self._graph, node_id))

    def cycles(self) -> list[list[str]]:
        """Return one cycle per strongly connected part, each rotated to its smallest id, sorted."""
        found = []
        for part in nx.strongly_connected_components(self._graph):
            inside = self._graph.subgraph(part)
            if inside.number_of_edges() == 0:
                continue
            start = min(part)
            path = nx.find_cycle(inside, source=start)
            ids = [edge[0] for edge in path]
            pivot = ids.index(min(ids))
            found.append(ids[pivot:] + ids[:pivot])
        return sorted(found)

    def order(self) -> list[str]:
        """Return the ids in lexicographic topological order; ties go to the earlier insertion.

        Raises:
            ValueError: The graph has a cycle.
        """
        rank = {node_id: i for i, node_id in enumerate(self._graph)}
        try:
            return list(nx.lexicographical_topological_sort(self._graph, key=rank.__getitem__))
        except nx.NetworkXUnfeasible as error:
            raise ValueError("the graph has a cycle") from error

    def generations(self) -> list[list[str]]:
        """Return ids by longest distance from a source, each generation in insertion order."""
        rank = {node_id: i for i, node_id in enumerate(self._graph)}
        layers = nx.topological_generations(self._graph)
        return [sorted(layer, key=rank.__getitem__) for layer in layers]

    def layers(self) -> tuple[list[list[str]], dict[tuple[str, str], list[str]]]:
        """Lay an acyclic graph out in layers, each node as far from the sources as it must be.

        Returns:
            The items of each layer in an order in which few edges cross: its nodes, and a place for
            each edge that skips the layer. And by edge the items on its way, both ends included.
        """
        ways: dict[tuple[str, str], list[str]] = {}
        drawn: nx.DiGraph[str] = nx.DiGraph()
        drawn.add_nodes_from(self._graph)
        depth = {n: i for i, layer in enumerate(self.generations()) for n in layer}
        for source, target in self._graph.edges:
            skipped = range(depth[source] + 1, depth[target])
            ways[source, target] = [source, *(f"{source}@{target}@{i}" for i in skipped), target]
            nx.add_path(drawn, ways[source, target])
        layers = [list(layer) for layer in nx.topological_generations(drawn)]
        for sweep in range(SWEEPS):
            for layer in layers[:: 1 if sweep % 2 == 0 else -1]:
                height = {n: (k + 0.5) / len(row) for row in layers for k, n in enumerate(row)}
                around = {n: [height[m] for m in nx.all_neighbors(drawn, n)] for n in layer}
                layer.sort(key=lambda n: fmean(around[n] or [height[n]]))
        return layers, ways

    def in_order(self) -> Iterator[tuple[str, NodeOp]]:
        """Yield (id, payload) in `order()`."""
        for node_id in self.order():
            yield node_id, self.op(node_id)

    def replaced(
        self,
        *,
        level: Level | None = None,
        system: System | None = None,
        nodes: Mapping[str, NodeOp] | None = None,
        edges: tuple[Edge, ...] | None = None,
    ) -> Graph:
        """Return a graph with the given parts changed and the rest kept."""
        return Graph(
            level=self.level if level is None else level,
            system=self.system if system is None else system,
            nodes=self.nodes() if nodes is None else nodes,
            edges=self.edges() if edges is None else edges,
        )

    def without_feedback(self) -> Graph:
        """Return the topology without its feedback links: the order within one round."""
        kept = tuple(e for e in self.edges() if not getattr(e.op, "feedback", False))
        return self.replaced(edges=kept)


def route_messages(graph: Graph, step: str) -> dict[Message, str]:
    """Return what a Prefill or an Ask takes, each message with the Send that yields it.

    Messages are in the order of the step's agents and of their slots; a slot without one stays
    empty. Two rounds' Sends of one source can flow into the same Prefill (a batch in which one
    agent is reached forward and another by feedback), so a message is told apart by its round.
    """
    op = graph.op(step)
    assert isinstance(op, PromptOp), f"{step} reads no prompt"
    sends: dict[tuple[str, int], str] = {}  # (link, round)
    for predecessor in graph.predecessors(step):
        send = graph.op(predecessor)
        if isinstance(send, Send):
            sends |= {(link, send.round): predecessor for link in send.links}
    found = {}
    for agent, variant in zip(op.agents, op.variants, strict=True):
        for slot in dict.fromkeys(graph.system.agents[agent].slots(variant)):
            link = graph.system.links[outer_link_id(slot, agent)]
            round_ = link.sent_in(op.round)
            if (link.id, round_) in sends:
                message = Message(agent=agent, slot=slot, link=link.id, round=round_)
                found[message] = sends[link.id, round_]
    return found


def find_exits(graph: Graph) -> tuple[SentMessage, ...]:
    """Return the messages that the last round takes from the round before it.

    Empty for fewer than three rounds: none is ever left out, because the messages of two have to be
    compared before the last one may follow.
    """
    system = graph.system
    if system.rounds < 3:
        return ()
    (answer,) = (step for step, op in graph.nodes().items() if is_answer(op))
    needed = graph.ancestors(answer) | {answer}
    taken = (
        message
        for step, op in graph.in_order()
        if step in needed and isinstance(op, PromptOp) and op.round == system.rounds
        for message in route_messages(graph, step)
    )
    return tuple(
        SentMessage(link=message.link, round=message.round)
        for message in taken
        if message.round < system.rounds
    )
