"""Memory planning: every step gets the key/value cache it works in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Cache, CacheOp, Decode, Level, NodeOp, Prefill, System
from recmas_compiler.passes.pass_base import Pass
from recmas_runtime.formats.layers import sequence_bytes
from recmas_runtime.formats.plan import cache_capacity
from recmas_runtime.formats.precisions import DTYPE_BYTES


@dataclass(frozen=True)
class PlanCaches(Pass):
    """Give agents that run together one cache, sized for the limits of the build.

    1. A cache belongs to the agents of a Prefill, in row order, and to no others: it carries
       their prompt prefix from round to round.
    2. Its capacity holds the longest prompt, rows that come before it included, and what is
       appended to it: latent steps, or the new tokens of a text. It is rounded up to a multiple of
       64 rows.
    3. It is alive from the first step that writes it to the last that reads it, which may be
       another agents' Prefill that copies a prefix.
    """

    requires = Level.UNROLLED
    ensures = Level.PLANNED

    def __call__(self, graph: Graph) -> Graph:
        """Return the program with the table of caches and each step's cache set."""
        users: dict[tuple[str, ...], list[str]] = {}
        nodes: dict[str, NodeOp] = {}
        for step, op in graph.in_order():
            nodes[step] = op
            if isinstance(op, CacheOp):
                agents = (op.agent,) if isinstance(op, Decode) else op.agents
                users.setdefault(agents, []).append(step)  # 1, 3
                nodes[step] = replace(op, cache="+".join(agents))
            if isinstance(op, Prefill) and op.prefix_of is not None:
                source = graph.op(op.prefix_of)
                assert isinstance(source, Prefill)
                users[source.agents].append(step)  # 3
        caches = [_cache(graph.system, agents, steps) for agents, steps in users.items()]
        system = replace(graph.system, caches={cache.id: cache for cache in caches})
        return graph.replaced(level=self.ensures, system=system, nodes=nodes)


def _cache(system: System, agents: tuple[str, ...], steps: list[str]) -> Cache:
    backbone = system.backbone_of(agents[0])
    capacity = _capacity(system, agents)
    return Cache(
        id="+".join(agents),
        backbone=backbone.name,
        agents=agents,
        capacity=capacity,
        bytes_per_sample=len(agents)
        * sequence_bytes(
            backbone.facts.layers,
            capacity,
            num_masks=system.num_masks(backbone.name),
            element_bytes=DTYPE_BYTES[backbone.types.caches],
        ),
        first_step=steps[0],  # 3
        last_step=steps[-1],
    )


def _capacity(system: System, agents: tuple[str, ...]) -> int:
    appended = max(appended_rows(system, name) for name in agents)
    rows = system.build.max_prompt_tokens + appended  # 2
    return cache_capacity(rows)


def appended_rows(system: System, agent: str) -> int:
    """Return how many rows an agent's turn appends at most to those of its prompt."""
    texts = [link.form.max_tokens or 0 for link in system.sent_by(agent) if link.form.needs_text]
    answer = [system.sampling.max_new_tokens] if agent == system.answer_agent else []
    return max(system.agents[agent].latent_steps, *texts, *answer, 0)
