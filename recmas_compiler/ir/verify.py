"""What must hold of a graph at each level: one rule table, checked between the stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from recmas_compiler.ir.graph import Graph, route_messages
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    CacheOp,
    Decode,
    Flow,
    Level,
    Link,
    NodeOp,
    Prefill,
    PromptOp,
    Send,
    System,
    Think,
    Write,
    is_answer,
)
from recmas_compiler.links.files import LinkWeights
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.ids import inner_link_id, outer_link_id, path_text
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.plan import (
    CACHE_ROWS_MULTIPLE,
    MAX_LATENT_STEPS,
    MAX_ROUNDS,
    Variant,
)
from recmas_runtime.formats.precisions import DTYPE_BYTES, buildable

# (type of the step, type of the step that takes from it) -> what flows
FLOWS: dict[tuple[type[NodeOp], type[NodeOp]], str] = {
    (Prefill, Think): "hidden",
    (Prefill, Write): "hidden",
    (Prefill, Decode): "hidden",
    (Prefill, Prefill): "cache",
    (Prefill, Send): "context",
    (Think, Send): "thoughts",
    (Write, Send): "written",
    (Send, Prefill): "message",
    (Send, Ask): "message",
    (Ask, Send): "written",
}


class Rule(NamedTuple):
    """Something that holds for every graph of a level.

    Attributes:
        name: What errors and tests call it.
        broken_at: Yields each node, edge (`a -> b`) or table entry where it does not hold. Rules
            are checked in order and may rely on the earlier ones of their table.
        message: What must hold.
    """

    name: str
    broken_at: Callable[[Graph], Iterable[str]]
    message: str


def _unresolved_names(graph: Graph) -> Iterator[str]:
    system = graph.system
    if system.answer_agent not in system.agents:
        yield system.answer_agent
    for key, backbone in system.backbones.items():
        if key != backbone.name or backbone.shared_as not in system.backbones:
            yield key
    for key, agent in system.agents.items():
        on = system.remotes if agent.backbone in system.remotes else system.backbones
        if key != agent.name or agent.backbone not in on:
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
    width = {name: system.backbone_of(name).facts.width for name in system.local_agents}
    for name, agent in system.agents.items():
        wanted = (width[name], width[name]) if name in width else None
        if (None if agent.inner is None else _ends(agent.inner)) != wanted:
            yield inner_link_id(name)
    for link in system.links.values():
        fits = link.weights is None or _ends(link.weights) == (
            width.get(link.source),
            width.get(link.target),
        )
        if not fits or (link.weights is None) == link.form.has_vectors:
            yield link.id


def _ends(weights: LinkWeights) -> tuple[int, int]:
    return weights.in_dim, weights.out_dim


def _latent_remotes(graph: Graph) -> Iterator[str]:
    system = graph.system
    yield from system.remotes.keys() & system.backbones.keys()
    for name, agent in system.agents.items():
        if system.is_remote(name) and agent.latent_steps:
            yield name
    for link in system.links.values():
        is_remote = system.is_remote(link.source) or system.is_remote(link.target)
        if is_remote and link.form.carries != "text":
            yield link.id


def _impossible_rows(graph: Graph) -> Iterator[str]:
    system = graph.system
    for link in system.links.values():
        form = link.form
        if form.carries != "cache":
            if link.layer_share is not None:
                yield link.id
            continue
        backbones = [system.backbone_of(name) for name in (link.source, link.target)]
        layers = backbones[0].facts.layers
        beyond = [layer for layer in form.layers or () if layer >= len(layers)]
        said_twice = form.layers is not None and link.layer_share is not None
        is_off = backbones[0] != backbones[1] or not form.rows or has_states(layers)
        if is_off or beyond or said_twice:
            yield link.id


def _slots_without_link(graph: Graph) -> Iterator[str]:
    for agent in graph.system.agents.values():
        for slot in (*agent.slots("first"), *agent.slots("then")):
            if outer_link_id(slot, agent.name) not in graph.system.links:
                yield agent.name


def _links_without_slot(graph: Graph) -> Iterator[str]:
    for link in graph.system.links.values():
        if link.source not in graph.system.agents[link.target].slots("then"):
            yield link.id


def _never_filled(graph: Graph) -> Iterator[str]:
    for agent in graph.system.agents.values():
        for slot in agent.slots("first"):
            if graph.system.links[outer_link_id(slot, agent.name)].feedback:
                yield agent.name


SYSTEM_RULES: tuple[Rule, ...] = (
    Rule("names_resolve", _unresolved_names, "every name in the tables is that of an entry"),
    Rule("remotes_speak_text", _latent_remotes, "agents on remote models take and give text"),
    Rule("equal_share", _unequal_shares, "a backbone uses the weights of an equal one"),
    Rule("bounds", _unbounded, "counts and limits are in bounds"),
    Rule("known_dtype", _unknown_dtypes, "a backbone's dtype is one with a known size"),
    Rule("known_precision", _unknown_precisions, "a backbone's precision can be built"),
    Rule("link_widths", _misfitting_links, "a link is as wide as the backbones at its ends"),
    Rule(
        "rows_can_be_taken",
        _impossible_rows,
        "rows go between agents of one backbone, whose layers keep rows only",
    ),
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
    edges = {outer_link_id(edge.source, edge.target): edge.op for edge in graph.edges()}
    links = graph.system.links
    for link_id, op in edges.items():
        if not isinstance(op, Link) or op != links.get(link_id):
            yield link_id
    yield from (link_id for link_id in links if link_id not in edges)


def _cycles_within_round(graph: Graph) -> Iterator[str]:
    yield from (path_text(*cycle, cycle[0]) for cycle in graph.without_feedback().cycles())


def _planned_caches(graph: Graph) -> Iterator[str]:
    yield from graph.system.caches


TOPOLOGY_RULES: tuple[Rule, ...] = (
    Rule("nodes_are_agents", _not_the_agents, "the nodes are the agents of the table"),
    Rule("edges_are_links", _not_the_links, "the edges are the links of the table"),
    Rule("cycles_by_feedback", _cycles_within_round, "every cycle has a feedback link"),
    Rule("no_caches_yet", _planned_caches, "caches are planned for a program only"),
)


def _not_steps(graph: Graph) -> Iterator[str]:
    yield from (step for step, op in graph.nodes().items() if isinstance(op, Agent))


def _unresolved_references(graph: Graph) -> Iterator[str]:
    system = graph.system
    for step, op in graph.nodes().items():
        known = set(_who(op)) <= system.agents.keys()
        if isinstance(op, Send):
            known &= set(op.links) <= system.links.keys()
        if isinstance(op, PromptOp):
            known &= len(op.variants) == len(op.agents)
        if not known:
            yield step


def _who(op: NodeOp) -> tuple[str, ...]:
    """Return the agents that a step runs; none twice in a valid program."""
    match op:
        case Prefill() | Think() | Write() | Ask():
            return op.agents
        case Send(source=source):
            return (source,)
        case Decode(agent=agent):
            return (agent,)
        case Agent():
            return ()


def _wrong_flows(graph: Graph) -> Iterator[str]:
    for edge in graph.edges():
        ends = (type(graph.op(edge.source)), type(graph.op(edge.target)))
        if not isinstance(edge.op, Flow) or FLOWS.get(ends) != edge.op.carries:
            yield path_text(edge.source, edge.target)


def _cycles(graph: Graph) -> Iterator[str]:
    yield from (path_text(*cycle, cycle[0]) for cycle in graph.cycles())


def _not_one_decode(graph: Graph) -> Iterator[str]:
    decodes = {step: op for step, op in graph.nodes().items() if is_answer(op)}
    if not decodes:
        yield "program"
    yield from list(decodes)[1:]
    for step, op in decodes.items():
        assert isinstance(op, Decode | Ask)
        if (_who(op), op.round) != ((graph.system.answer_agent,), graph.system.rounds):
            yield step


def _rounds_out_of_bounds(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if not isinstance(op, Agent) and not 1 <= op.round <= graph.system.rounds:
            yield step


def _rounds_out_of_order(graph: Graph) -> Iterator[str]:
    latest = 0
    for step, op in graph.in_order():
        assert not isinstance(op, Agent)
        if op.round < latest:
            yield step
        latest = max(latest, op.round)


def _repeated_turns(graph: Graph) -> Iterator[str]:
    turns: Counter[tuple[str, int, str]] = Counter()
    for step, op in graph.nodes().items():
        assert not isinstance(op, Agent)
        for what in op.links if isinstance(op, Send) else _who(op):
            turn = (type(op).__name__, op.round, what)
            turns[turn] += 1
            if turns[turn] == 2:
                yield step


def _without_origin(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        taken = [graph.op(source) for source in graph.predecessors(step)]
        match op, taken:
            case (Think() | Write() | Decode(), [Prefill() as prefill]):
                holds = (prefill.agents, prefill.round) == (_who(op), op.round)
            case (Send(), _):
                form = graph.system.links[op.links[0]].form
                writes = Ask if graph.system.is_remote(op.source) else Write
                needed = {
                    Prefill: form.needs_context,
                    Think: form.needs_thoughts,
                    writes: form.needs_text,
                }
                holds = {type(step) for step in taken} == {k for k in needed if needed[k]} and all(
                    isinstance(step, Prefill | Think | Write | Ask)
                    and op.source in step.agents
                    and step.round == op.round
                    for step in taken
                )
            case _:
                holds = isinstance(op, PromptOp)
        if not holds:
            yield step


def _unequal_num_steps(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, Think):
            declared = {graph.system.agents[name].latent_steps for name in op.agents}
            if len(declared) != 1 or 0 in declared:
                yield step


def _mixed_batches(graph: Graph) -> Iterator[str]:
    system = graph.system
    batch: dict[str, tuple[str, ...]] = {}
    for step, op in graph.nodes().items():
        if isinstance(op, CacheOp | Ask):
            who = _who(op)
            remote = {name for name in who if system.is_remote(name)}
            backbones = {system.backbone_of(name).name for name in who if name not in remote}
            is_one = remote == set(who) if isinstance(op, Ask) else not remote
            stable = all(batch.setdefault(name, who) == who for name in who)
            if not (is_one and stable) or len(backbones) > 1:
                yield step


def _uneven_fan_outs(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, Send):
            links = [graph.system.links[link] for link in op.links]
            widths = {None if link.weights is None else link.weights.out_dim for link in links}
            forms = {link.form for link in links}
            if len(widths) != 1 or len(forms) != 1 or (None in widths and len(links) > 1):
                yield step


def _inner_not_once(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, Send):
            form = graph.system.links[op.links[0]].form
            thinks = [graph.op(source) for source in graph.predecessors(step)]
            fused = any(isinstance(think, Think) and think.fused for think in thinks)
            in_think = form.carries == "thoughts" and fused
            if op.apply_inner != (form.has_vectors and not in_think):
                yield step


def _unequal_texts(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, Write | Ask) and not is_answer(op):
            forms = [link.form for name in op.agents for link in graph.system.sent_by(name)]
            most = {form.max_tokens for form in forms if form.needs_text}
            states = any(form.needs_written_states for form in forms)
            keeps = isinstance(op, Write) and op.keeps_states
            if most != {op.max_tokens} or keeps != states:
                yield step


def _wrong_variants(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, PromptOp):
            expected = tuple(_variant(graph.system, name, op.round) for name in op.agents)
            if op.variants != expected:
                yield step


def _variant(system: System, name: str, round_: int) -> Variant:
    agent = system.agents[name]
    feedback = any(system.links[outer_link_id(slot, name)].feedback for slot in agent.slots("then"))
    return "first" if round_ == 1 and feedback and agent.first is not None else "then"


def _wrong_messages(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if not isinstance(op, PromptOp):
            continue
        due = {
            (agent, slot)
            for agent, variant in zip(op.agents, op.variants, strict=True)
            for slot in graph.system.agents[agent].slots(variant)
            if _is_due(graph.system, slot, agent, op.round)
        }
        found = route_messages(graph, step)
        sends = {s for s in graph.predecessors(step) if isinstance(graph.op(s), Send)}
        if {(m.agent, m.slot) for m in found} != due or set(found.values()) != sends:
            yield step


def _is_due(system: System, slot: str, agent: str, round_: int) -> bool:
    """Return whether a message was sent for this slot and has anything in it."""
    link = system.links[outer_link_id(slot, agent)]
    return link.sent_in(round_) >= 1 and link.form.is_sent(system.agents[slot].latent_steps)


def _wrong_reuse(graph: Graph) -> Iterator[str]:
    latest: dict[tuple[str, ...], str] = {}
    for step, op in graph.in_order():
        if not isinstance(op, Prefill):
            continue
        kept = {p for p in graph.predecessors(step) if isinstance(graph.op(p), Prefill)}
        flows = {source for source in (op.reuse, op.prefix_of) if source is not None}
        if kept != flows or op.reuse not in (None, latest.get(op.agents)):
            yield step
        latest[op.agents] = step


def _wrong_prefixes(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if not isinstance(op, Prefill) or op.prefix_of is None:
            continue
        source = graph.op(op.prefix_of) if op.prefix_of in graph else None
        if (
            op.reuse is not None
            or not isinstance(source, Prefill)
            or source.agents == op.agents
            or graph.system.backbone_of(source.agents[0]) != graph.system.backbone_of(op.agents[0])
        ):
            yield step


def _wrong_snapshots(graph: Graph) -> Iterator[str]:
    """Yield Prefills that restore what the one whose rows they keep has not saved, or save idly."""
    restored: set[tuple[str | None, str]] = set()
    prefills = {s: op for s, op in graph.nodes().items() if isinstance(op, Prefill)}
    for step, op in prefills.items():
        if op.restore is None:
            continue
        restored.add((op.rows_of, op.restore))
        snapshot = graph.system.snapshots.get(op.restore)
        source = prefills.get(op.rows_of or "")
        if source is None or snapshot is None or source.agents != snapshot.agents:
            yield step
    for step, op in prefills.items():
        states = has_states(graph.system.backbone_of(op.agents[0]).facts.layers)
        unused = any((step, name) not in restored for name in op.snapshots)
        if unused or (op.snapshots and not states):
            yield step
    saved = {(step, name) for step, op in prefills.items() for name in op.snapshots}
    yield from (step or name for step, name in restored - saved)


UNROLLED_RULES: tuple[Rule, ...] = (
    Rule("nodes_are_steps", _not_steps, "every node of a program is a step"),
    Rule("steps_resolve", _unresolved_references, "steps name agents and links of the tables"),
    Rule("flow_kinds", _wrong_flows, "steps take from each other only what FLOWS lists"),
    Rule("acyclic", _cycles, "a program has no cycle"),
    Rule("one_decode", _not_one_decode, "the answer agent writes once, in the last round"),
    Rule("rounds_in_bounds", _rounds_out_of_bounds, "a step's round is one of the system's"),
    # What makes caches safe: an agent's next Prefill cannot overtake its steps of this round.
    Rule("rounds_in_order", _rounds_out_of_order, "all steps of a round run before the next round"),
    Rule("one_turn_a_round", _repeated_turns, "an agent does each thing once a round"),
    Rule(
        "steps_have_origin",
        _without_origin,
        "Think, Write and Decode follow a Prefill, Send what its messages are made of",
    ),
    Rule("num_steps", _unequal_num_steps, "agents that think together take equally many steps"),
    Rule("batches", _mixed_batches, "a batch has one backbone and is the same in every round"),
    Rule("texts", _unequal_texts, "agents that write together do so for links of one bound"),
    Rule("even_fan_out", _uneven_fan_outs, "messages of one Send are alike and equally wide"),
    Rule("inner_once", _inner_not_once, "the inner link is in the Think or in the Send"),
    Rule(
        "variants", _wrong_variants, "`first` is used exactly while a feedback slot has no message"
    ),
    Rule(
        "messages", _wrong_messages, "a Prefill takes exactly the messages that its slots are due"
    ),
    Rule("reuse", _wrong_reuse, "a Prefill reuses the rows of the same agents' latest Prefill"),
    Rule(
        "prefixes",
        _wrong_prefixes,
        "a Prefill without rows of its own copies those of other agents on its backbone",
    ),
    Rule(
        "snapshots",
        _wrong_snapshots,
        "a Prefill restores states that the one whose rows it keeps has saved, and none are saved "
        "for nobody",
    ),
)


def _without_cache(graph: Graph) -> Iterator[str]:
    for step, op in graph.nodes().items():
        if isinstance(op, CacheOp):
            cache = graph.system.caches.get(op.cache or "")
            if cache is None or cache.agents != _who(op):
                yield step


def _bad_caches(graph: Graph) -> Iterator[str]:
    for key, cache in graph.system.caches.items():
        backbones = {graph.system.backbone_of(name).name for name in cache.agents}
        if key != cache.id or backbones != {cache.backbone}:
            yield key


def _shared_caches(graph: Graph) -> Iterator[str]:
    owners = Counter(name for cache in graph.system.caches.values() for name in cache.agents)
    yield from (name for name, count in owners.items() if count > 1)


def _small_caches(graph: Graph) -> Iterator[str]:
    system = graph.system
    for cache in system.caches.values():
        appended = [system.agents[name].latent_steps for name in cache.agents]
        appended += [system.sampling.max_new_tokens] * (system.answer_agent in cache.agents)
        appended += [
            link.form.max_tokens or 0 for name in cache.agents for link in system.sent_by(name)
        ]
        needed = system.build.max_prompt_tokens + max(appended)
        if cache.capacity < needed or cache.capacity % CACHE_ROWS_MULTIPLE:
            yield cache.id


def _wrong_lifetimes(graph: Graph) -> Iterator[str]:
    used: dict[str, list[str]] = {cache: [] for cache in graph.system.caches}
    for step, op in graph.in_order():
        if isinstance(op, CacheOp) and op.cache is not None:
            used[op.cache].append(step)
        if isinstance(op, Prefill) and op.prefix_of is not None:
            source = graph.op(op.prefix_of)
            if isinstance(source, Prefill) and source.cache is not None:
                used[source.cache].append(step)
    for cache in graph.system.caches.values():
        steps = used[cache.id]
        if not steps or (cache.first_step, cache.last_step) != (steps[0], steps[-1]):
            yield cache.id


PLANNED_RULES: tuple[Rule, ...] = (
    Rule("caches_resolve", _bad_caches, "a cache is for agents of its backbone"),
    Rule("steps_have_caches", _without_cache, "every step works in the cache of its agents"),
    Rule("caches_not_shared", _shared_caches, "no other agent writes into an agent's cache"),
    Rule("caches_cover", _small_caches, "a cache holds the longest prompt and what is appended"),
    Rule("cache_lifetimes", _wrong_lifetimes, "a cache is alive from its first to its last use"),
)


RULES: dict[Level, tuple[Rule, ...]] = {
    Level.TOPOLOGY: (*SYSTEM_RULES, *TOPOLOGY_RULES),
    Level.UNROLLED: (*SYSTEM_RULES, *UNROLLED_RULES),
    Level.PLANNED: (*SYSTEM_RULES, *UNROLLED_RULES, *PLANNED_RULES),
}


def verify(graph: Graph, *, at: str) -> None:
    """Check that every rule of the graph's level holds.

    Args:
        at: Where in the pipeline it stands, for the message: `after UnrollRounds`.

    Raises:
        RecmasError: RM204 for each place where the first broken rule is broken.
    """
    for rule in RULES[graph.level]:
        places = list(dict.fromkeys(rule.broken_at(graph)))
        if places:
            broken = f"{at}, rule {rule.name} of level {graph.level.name} is broken at"
            hint = "This is a bug in recmas or in a pass of yours; --dump-ir DIR shows which pass."
            raise RecmasError(
                Problem(code="RM204", message=f"{broken} {place}: {rule.message}.", hint=hint)
                for place in places
            )
