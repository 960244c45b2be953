"""Fusion: links join the call before them, or become one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level, NodeOp, Send, StepOp, Think, send_id
from recmas_compiler.passes.pass_base import Pass, merge_steps
from recmas_runtime.formats.messages import MessageForm


@dataclass(frozen=True)
class FuseLinks(Pass):
    """Save calls around links.

    1. A latent step computes its inner link in the step graph.
    2. A Send takes R(thoughts) from the latent steps, which computed it to go on, and applies its
       outer link only.
    3. Sends of one source in one round whose messages are vectors of one form, equally many and
       equally wide, become one batched call. When each message is seen is a matter of the receiving
       Prefill, so feedback and forward links may join.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with fused steps and joined Sends."""
        nodes = {step: _fused(graph, op) for step, op in graph.nodes().items()}
        fused = graph if nodes == graph.nodes() else graph.replaced(nodes=nodes)
        joined = _fan_outs(fused)
        return merge_steps(fused, joined) if joined else fused


def _fused(graph: Graph, op: NodeOp) -> NodeOp:
    if isinstance(op, Think):
        return replace(op, fused=True)  # 1
    if isinstance(op, Send) and _form(graph, op).carries == "thoughts":
        return replace(op, apply_inner=False)  # 2
    return op


def _form(graph: Graph, op: Send) -> MessageForm:
    return graph.system.links[op.links[0]].form


def _fan_outs(graph: Graph) -> dict[str, tuple[tuple[str, ...], StepOp]]:
    groups: dict[tuple[str, int, int, MessageForm], list[str]] = {}
    for step, op in graph.nodes().items():
        if isinstance(op, Send):
            weights = graph.system.links[op.links[0]].weights
            if weights is not None:
                key = op.source, op.round, weights.out_dim, _form(graph, op)
                groups.setdefault(key, []).append(step)
    joined: dict[str, tuple[tuple[str, ...], StepOp]] = {}
    for (source, round_, _, _), members in groups.items():
        if len(members) > 1:  # 3
            sends = [op for op in map(graph.op, members) if isinstance(op, Send)]
            targets = tuple(target for op in sends for target in op.targets)
            send = replace(sends[0], targets=targets)
            joined[send_id(round_, source, targets)] = (tuple(members), send)
    return joined
