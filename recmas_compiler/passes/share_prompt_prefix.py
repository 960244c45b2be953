"""Common subexpressions between agents: what several prompts begin with is computed by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Flow, Level, NodeOp, Prefill, System
from recmas_compiler.ir.prompt_parts import common_parts
from recmas_compiler.passes.hoist_prompt_prefix import has_rows
from recmas_compiler.passes.pass_base import Pass
from recmas_runtime.formats.plan import Variant

# Fields that both prompts begin with, and letters of text.
Amount = tuple[int, int]


@dataclass(frozen=True)
class SharePromptPrefix(Pass):
    """Let a Prefill copy the cached rows of another agent's prompt that begins like its own.

    1. A Prefill that has rows of its own from an earlier round keeps those.
    2. Others take the rows that other agents' latest Prefill on the same backbone has left, of
       those agents whose prompt has most in common with theirs: system text and chat template are
       the same, and so are the first parts of the prompts, up to the first slot of either. Fields
       count for more than text. How many tokens it is depends on the record and is found at run
       time.
    3. As for HoistPromptPrefix, layers with a running state have no rows to copy.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with `prefix_of` set and the rows flowing from agent to agent."""
        nodes: dict[str, NodeOp] = graph.nodes()
        edges = list(graph.edges())
        latest: dict[tuple[str, ...], tuple[str, Prefill]] = {}
        for step, op in graph.in_order():
            if not isinstance(op, Prefill):
                continue
            is_settled = op.reuse is not None or op.prefix_of is not None  # 1
            source = None if is_settled else _most_alike(graph.system, op, latest)
            if source is not None:
                nodes[step] = replace(op, prefix_of=source)
                edges.append(Edge(source, step, Flow(carries="cache")))
            latest[op.agents] = step, op
        if len(edges) == len(graph.edges()):
            return graph
        return graph.replaced(nodes=nodes, edges=tuple(edges))


def _most_alike(
    system: System, op: Prefill, latest: Mapping[tuple[str, ...], tuple[str, Prefill]]
) -> str | None:
    if not has_rows(system, op):  # 3
        return None
    backbone = system.backbone_of(op.agents[0])
    best, most = None, (0, 0)
    for agents, (step, other) in latest.items():
        if agents != op.agents and system.backbone_of(agents[0]) == backbone:
            amount = _amount(system, op, other)
            if amount > most:
                best, most = step, amount
    return best


def _amount(system: System, op: Prefill, other: Prefill) -> Amount:
    """Return what every agent of a batch has in common with some agent of the other."""
    return min(
        max(
            common_beginning(system, (agent, variant), (like, its))
            for like, its in zip(other.agents, other.variants, strict=True)
        )
        for agent, variant in zip(op.agents, op.variants, strict=True)
    )


def common_beginning(
    system: System, one: tuple[str, Variant], other: tuple[str, Variant]
) -> Amount:
    """Return how much the prompts of two agents begin with alike: fields, and letters of text."""
    (left, left_variant), (right, right_variant) = (
        (system.agents[name], variant) for name, variant in (one, other)
    )
    if (left.system, left.chat_template) != (right.system, right.chat_template):  # 2
        return 0, 0
    begins_alike = common_parts(left.parts(left_variant), right.parts(right_variant))
    parts = (*left.system, *begins_alike)
    letters = sum(len(part.value) for part in parts if part.kind == "text")
    return sum(part.kind == "field" for part in parts), letters
