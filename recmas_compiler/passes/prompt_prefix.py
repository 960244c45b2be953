"""Prompt prefixes: computed once for all rounds, and once for agents that share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Flow, Level, NodeOp, Prefill, System
from recmas_compiler.passes.pass_base import Pass
from recmas_runtime.formats.plan import PromptPart, Variant


@dataclass(frozen=True)
class HoistPromptPrefix(Pass):
    """Let a Prefill keep cached rows of the same agents' Prefill in an earlier round.

    1. A Prefill reuses the latest earlier Prefill of the same agents. What is kept is the text
       that both prompts begin with, up to the first slot of either; how many tokens that is
       depends on the record and is found at run time.
    2. Nothing is kept where rows of other agents come before the prompt: they differ from round to
       round, and all rows behind them with them.
    """

    requires = Level.UNROLLED
    ensures = Level.UNROLLED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with `reuse` set and the cache flowing from round to round."""
        nodes: dict[str, NodeOp] = graph.nodes()
        edges = list(graph.edges())
        latest: dict[tuple[str, ...], str] = {}
        for step, op in graph.in_order():
            if not isinstance(op, Prefill) or takes_rows(graph.system, op):  # 2
                continue
            earlier = latest.get(op.agents)
            if earlier is not None and op.reuse is None:
                nodes[step] = replace(op, reuse=earlier)  # 1
                edges.append(Edge(earlier, step, Flow(carries="cache")))
            latest[op.agents] = step
        if len(edges) == len(graph.edges()):
            return graph
        return graph.replaced(nodes=nodes, edges=tuple(edges))


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
    3. Agents that send a context run their whole prompts, for its states are not among the rows
       of others. Rows behind those of other agents are neither copied nor wanted.
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
            if takes_rows(graph.system, op):  # 3
                continue
            has_source = op.reuse is not None or op.prefix_of is not None  # 1
            has_source |= sends_context(graph.system, op)  # 3
            source = None if has_source else _longest_shared(graph.system, op, latest)
            if source is not None:
                nodes[step] = replace(op, prefix_of=source)
                edges.append(Edge(source, step, Flow(carries="cache")))
            latest[op.agents] = step, op
        if len(edges) == len(graph.edges()):
            return graph
        return graph.replaced(nodes=nodes, edges=tuple(edges))


def takes_rows(system: System, op: Prefill) -> bool:
    """Tell whether rows of other agents come before the prompts of a Prefill, of whatever round."""
    forms = (link.form for link in system.links.values() if link.target in op.agents)
    return any(form.carries == "cache" for form in forms)


def sends_context(system: System, op: Prefill) -> bool:
    """Tell whether the states of a Prefill's prompts are sent."""
    forms = (link.form for link in system.links.values() if link.source in op.agents)
    return any(form.carries == "context" for form in forms)


def _longest_shared(
    system: System, op: Prefill, latest: Mapping[tuple[str, ...], tuple[str, Prefill]]
) -> str | None:
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


def common_parts(one: Sequence[PromptPart], other: Sequence[PromptPart]) -> Iterator[PromptPart]:
    """Yield what two prompts both begin with, before the first slot of either."""
    for left, right in zip(one, other, strict=False):
        if "slot" in (left.kind, right.kind):
            return
        if left != right:
            if left.kind == right.kind == "text":
                pairs = zip(left.value, right.value, strict=False)
                equal = takewhile(lambda pair: pair[0] == pair[1], pairs)
                shared = "".join(letter for letter, _ in equal)
                # Half a word is hardly ever a token of its own.
                whole_words = shared[: max(map(shared.rfind, " \n")) + 1]
                yield PromptPart(kind="text", value=whole_words)
            return
        yield left
