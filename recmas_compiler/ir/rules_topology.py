"""Rules for the tables of a system, at every level, and for the topology."""

from __future__ import annotations

from collections.abc import Iterator

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Link, LinkWeights
from recmas_compiler.ir.rule import Rule
from recmas_runtime.formats.precisions import DTYPE_BYTES, buildable

MAX_ROUNDS = 64
MAX_LATENT_STEPS = 4096


def _unresolved_names(graph: Graph) -> Iterator[str]:
    system = graph.system
    if system.answer_agent not in system.agents:
        yield system.answer_agent
    for key, backbone in system.backbones.items():
        if key != backbone.name or backbone.shared_as not in system.backbones:
            yield key
    for key, agent in system.agents.items():
        if key != agent.name or agent.backbone not in system.backbones:
            yield key
    for key, link in system.links.items():
        if key != link.id or not {link.source, link.target} <= system.agents.keys():
            yield key


def _unequal_shares(graph: Graph) -> Iterator[str]:
    backbones = graph.system.backbones
    for name, backbone in backbones.items():
        owner = backbones[backbone.shared_as]
        equal = owner.engine_identity == backbone.engine_identity
        if not equal or owner.shared_as != owner.name:
            yield name


def _unbounded(graph: Graph) -> Iterator[str]:
    system = graph.system
    bounded = {
        "rounds": 1 <= system.rounds <= MAX_ROUNDS,
        "max_prompt_tokens": system.build.max_prompt_tokens >= 1,
        "max_batch": system.build.max_batch >= 1,
        "max_new_tokens": system.sampling.max_new_tokens >= 1,
    }
    yield from (name for name, holds in bounded.items() if not holds)
    for name, agent in system.agents.items():
        if not 0 <= agent.latent_steps <= MAX_LATENT_STEPS:
            yield name


def _unknown_dtypes(graph: Graph) -> Iterator[str]:
    yield from (n for n, b in graph.system.backbones.items() if b.dtype not in DTYPE_BYTES)


def _unknown_precisions(graph: Graph) -> Iterator[str]:
    known = buildable()
    yield from (n for n, b in graph.system.backbones.items() if b.precision not in known)


def _misfitting_links(graph: Graph) -> Iterator[str]:
    system = graph.system
    width = {name: system.backbone_of(name).facts.width for name in system.agents}
    for name, agent in system.agents.items():
        if _ends(agent.inner) != (width[name], width[name]):
            yield f"{name}.inner"
    for link in system.links.values():
        if _ends(link.weights) != (width[link.source], width[link.target]):
            yield link.id


def _ends(weights: LinkWeights) -> tuple[int, int]:
    return weights.in_dim, weights.out_dim


def _slots_without_link(graph: Graph) -> Iterator[str]:
    for agent in graph.system.agents.values():
        for slot in (*agent.slots("first"), *agent.slots("then")):
            if f"{slot}->{agent.name}" not in graph.system.links:
                yield agent.name


def _links_without_slot(graph: Graph) -> Iterator[str]:
    for link in graph.system.links.values():
        if link.source not in graph.system.agents[link.target].slots("then"):
            yield link.id


def _never_filled(graph: Graph) -> Iterator[str]:
    for agent in graph.system.agents.values():
        for slot in agent.slots("first"):
            if graph.system.links[f"{slot}->{agent.name}"].feedback:
                yield agent.name


SYSTEM_RULES: tuple[Rule, ...] = (
    Rule("names_resolve", _unresolved_names, "every name in the tables is that of an entry"),
    Rule("equal_share", _unequal_shares, "a backbone uses the weights of an equal one"),
    Rule("bounds", _unbounded, "counts and limits are in bounds"),
    Rule("known_dtype", _unknown_dtypes, "a backbone's dtype is one with a known size"),
    Rule("known_precision", _unknown_precisions, "a backbone's precision can be built"),
    Rule("link_widths", _misfitting_links, "a link is as wide as the backbones at its ends"),
    Rule("slots_have_links", _slots_without_link, "every slot of a prompt has its link"),
    Rule("links_have_slots", _links_without_slot, "every link has its slot in `then`"),
    Rule("first_is_filled", _never_filled, "a round without feedback fills every slot in use"),
)


def _not_the_agents(graph: Graph) -> Iterator[str]:
    nodes = graph.nodes()
    yield from (name for name, op in nodes.items() if not isinstance(op, Agent))
    agents = graph.system.agents
    yield from (name for name in nodes if nodes[name] != agents.get(name))
    yield from (name for name in agents if name not in nodes)


def _not_the_links(graph: Graph) -> Iterator[str]:
    edges = {f"{edge.source}->{edge.target}": edge.op for edge in graph.edges()}
    links = graph.system.links
    for link_id, op in edges.items():
        if not isinstance(op, Link) or op != links.get(link_id):
            yield link_id
    yield from (link_id for link_id in links if link_id not in edges)


def _cycles_within_round(graph: Graph) -> Iterator[str]:
    yield from (" -> ".join((*cycle, cycle[0])) for cycle in graph.without_feedback().cycles())


def _planned_caches(graph: Graph) -> Iterator[str]:
    yield from graph.system.caches


TOPOLOGY_RULES: tuple[Rule, ...] = (
    Rule("nodes_are_agents", _not_the_agents, "the nodes are the agents of the table"),
    Rule("edges_are_links", _not_the_links, "the edges are the links of the table"),
    Rule("cycles_by_feedback", _cycles_within_round, "every cycle has a feedback link"),
    Rule("no_caches_yet", _planned_caches, "caches are planned for a program only"),
)
