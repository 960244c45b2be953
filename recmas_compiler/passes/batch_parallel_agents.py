"""Horizontal fusion: agents that could run side by side run as one batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import (
    Ask,
    Decode,
    Level,
    Prefill,
    StepOp,
    System,
    Think,
    Write,
    ask_id,
    prefill_id,
    think_id,
    write_id,
)
from recmas_compiler.passes.pass_base import Pass, merge_steps
from recmas_compiler.passes.prompt_prefix import takes_rows


@dataclass(frozen=True)
class BatchParallelAgents(Pass):
    """Run agents of one generation as rows of one batch.

    1. Agents form a batch if they share a backbone, or run on remote models, take the same number
       of latent steps, stand in the same generation of the links that are not feedback (so none
       waits for another), and do the same kinds of steps in the same rounds, with equal reuse and
       fusion; and rows come before the prompts of all of them or of none.
    2. A batch is the same in every round, so its cache can live on from round to round.
    3. Rows are ordered by agent, in order of declaration. Sends stay apart: each source has links
       of its own.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with the Prefills and Thinks of each batch merged."""
        batches = _batches(graph)
        if not batches:
            return graph
        merged: dict[str, tuple[tuple[str, ...], StepOp]] = {}
        for agents in batches:
            merged |= _merged_steps(graph, agents)
        return merge_steps(graph, merged)


def _batches(graph: Graph) -> list[tuple[str, ...]]:
    generation = _generations(graph.system)
    work = _work(graph)
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, agent in graph.system.agents.items():  # 3
        if name in work:
            # Calls of remote models run side by side, whichever they are of.
            is_remote = graph.system.is_remote(name)
            backbone = None if is_remote else graph.system.backbone_of(name).name
            key = (backbone, agent.latent_steps, generation[name], work[name])  # 1, 2
            alike.setdefault(key, []).append(name)
    return [tuple(agents) for agents in alike.values() if len(agents) > 1]


def _generations(system: System) -> dict[str, int]:
    links = (link for link in system.links.values() if not link.feedback)
    edges = tuple(Edge(link.source, link.target, link) for link in links)
    within_round = Graph(level=Level.TOPOLOGY, system=system, nodes=system.agents, edges=edges)
    return {name: i for i, layer in enumerate(within_round.generations()) for name in layer}


def _work(graph: Graph) -> dict[str, tuple[tuple[object, ...], ...]]:
    """Return per agent what it does on its own, in order; agents of a batch do not appear."""
    work: dict[str, tuple[tuple[object, ...], ...]] = {}
    for _, op in graph.in_order():
        match op:
            case Prefill(agents=(agent,)):
                done: tuple[object, ...] = (
                    op.round,
                    "prefill",
                    op.reuse is not None,
                    takes_rows(graph.system, op),
                )
            case Think(agents=(agent,)):
                done = (op.round, "think", op.fused)
            case Write(agents=(agent,)):
                done = (op.round, "write", op.max_tokens, op.keeps_states)
            case Decode(agent=agent):
                done = (op.round, "decode")
            case Ask(agents=(agent,)):
                done = (op.round, "ask", op.max_tokens)
            case _:
                continue
        work[agent] = (*work.get(agent, ()), done)
    return work


def _merged_steps(
    graph: Graph, agents: tuple[str, ...]
) -> dict[str, tuple[tuple[str, ...], StepOp]]:
    merged: dict[str, tuple[tuple[str, ...], StepOp]] = {}
    latest: str | None = None
    for _, op in graph.in_order():
        match op:
            case Prefill(agents=(agent,)) if agent == agents[0]:
                members = tuple(prefill_id(op.round, (name,)) for name in agents)
                prefills = [p for p in map(graph.op, members) if isinstance(p, Prefill)]
                new = prefill_id(op.round, agents)
                variants = tuple(p.variants[0] for p in prefills)
                reuse = latest if op.reuse is not None else None
                merged[new] = (
                    members,
                    Prefill(agents=agents, round=op.round, variants=variants, reuse=reuse),
                )
                latest = new
            case Think(agents=(agent,)) if agent == agents[0]:
                members = tuple(think_id(op.round, (name,)) for name in agents)
                merged[think_id(op.round, agents)] = (
                    members,
                    Think(agents=agents, round=op.round, fused=op.fused),
                )
            case Write(agents=(agent,)) if agent == agents[0]:
                members = tuple(write_id(op.round, (name,)) for name in agents)
                merged[write_id(op.round, agents)] = members, replace(op, agents=agents)
            case Ask(agents=(agent,)) if agent == agents[0]:
                members = tuple(ask_id(op.round, (name,)) for name in agents)
                asks = [a for a in map(graph.op, members) if isinstance(a, Ask)]
                variants = tuple(a.variants[0] for a in asks)
                merged[ask_id(op.round, agents)] = (
                    members,
                    replace(op, agents=agents, variants=variants),
                )
            case _:
                pass
    return merged
