"""Graphs of other frameworks to an order of agents: starts, ends, loops, nodes to leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Edge = tuple[str, str]


def without(nodes: Iterable[str], edges: Iterable[Edge]) -> list[Edge]:
    """Return the edges with some nodes taken out: who was before them leads to who was behind.

    A loop over taken nodes alone leaves nothing; one from an agent to itself stays.
    """
    kept = dict.fromkeys(edges)
    for node in dict.fromkeys(nodes):
        before = [s for s, t in kept if t == node and s != node]
        behind = [t for s, t in kept if s == node and t != node]
        kept = {edge: None for edge in kept if node not in edge}
        kept |= {(s, t): None for s in before for t in behind}
    return list(kept)


def order_from(starts: Sequence[str], nodes: Sequence[str], edges: Sequence[Edge]) -> list[str]:
    """Return the nodes that the starts reach, so that edges point on wherever they can.

    An edge back to a node on the way to itself closes a loop; without those edges the graph has an
    order, in which nodes stand as early as they can, others as they were named.
    """
    following: dict[str, list[str]] = {node: [] for node in nodes}
    for edge in edges:
        following[edge[0]].append(edge[1])
    onward: list[Edge] = []
    state: dict[str, bool] = {}  # node -> whether it is still on the way
    for start in starts:
        if start in state:
            continue
        way = [(start, iter(following[start]))]
        state[start] = True
        while way:
            node, targets = way[-1]
            target = next(targets, None)
            if target is None:
                state[node] = False
                way.pop()
                continue
            if state.get(target) is True:
                continue  # it closes a loop
            onward.append((node, target))
            if target not in state:
                state[target] = True
                way.append((target, iter(following[target])))
    return _sorted([node for node in nodes if node in state], onward)


def _sorted(nodes: Sequence[str], edges: Sequence[Edge]) -> list[str]:
    waiting = {node: {s for s, t in edges if t == node} for node in nodes}
    order: list[str] = []
    while waiting:
        ready = next(node for node, before in waiting.items() if before <= set(order))
        del waiting[ready]
        order.append(ready)
    return order


def ends_of(order: Sequence[str], edges: Iterable[Edge]) -> list[str]:
    """Return the agents that no other one reads, not even in the next round."""
    sources = {source for source, target in edges if source != target}
    return [node for node in order if node not in sources]


def has_loop(order: Sequence[str], edges: Iterable[Edge]) -> bool:
    """Tell whether an edge leads to the next round."""
    rank: Mapping[str, int] = {node: i for i, node in enumerate(order)}
    return any(rank[source] >= rank[target] for source, target in edges)
