"""Program IR to plan: the graph of steps becomes the flat list that the runtime follows."""

from __future__ import annotations

from msgspec import structs

from recmas_compiler.ir.graph import Graph, find_exits, route_messages
from recmas_compiler.ir.ops import (
    Agent,
    Ask,
    Decode,
    Level,
    Prefill,
    Send,
    StepOp,
    System,
    Think,
    Write,
)
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.plan import (
    AgentPlan,
    AskStep,
    CachePlan,
    CacheStep,
    DecodeStep,
    LinkPlan,
    Plan,
    PrefillStep,
    PromptStep,
    SendStep,
    SnapshotPlan,
    Step,
    ThinkStep,
    WriteStep,
    prompt_fields,
)


def build_plan(program: Graph) -> Plan:
    """Return the plan of a program.

    Agents that no step runs and no prompt has a slot for are left out, and so are their links.

    Args:
        program: Of level PLANNED for a bundle; the plan of an UNROLLED one has no caches in its
            table, and names for them only.
    """
    assert program.level >= Level.UNROLLED, "only programs have a plan"
    system = program.system
    shares = [link.id for link in system.links.values() if link.layer_share is not None]
    assert not shares, f"the layers of {shares} are not chosen yet"
    steps = tuple(
        _step(program, step, op) for step, op in program.in_order() if not isinstance(op, Agent)
    )
    opening = {
        agent
        for step in steps
        if isinstance(step, PromptStep)
        for agent, variant in zip(step.agents, step.variants, strict=True)
        if variant == "first"
    }
    agents = {
        name: agent_plan(system, name, has_first=name in opening) for name in live_agents(program)
    }
    sent = {link for step in steps if isinstance(step, SendStep) for link in step.links}
    used = {step.cache for step in steps if isinstance(step, CacheStep)}
    return Plan(
        name=system.name,
        rounds=system.rounds,
        answer_agent=system.answer_agent,
        agents=agents,
        links={
            link.id: LinkPlan(source=link.source, target=link.target, **structs.asdict(link.form))
            for link in system.links.values()
            if link.id in sent
        },
        caches={
            cache.id: CachePlan(
                backbone=cache.backbone,
                agents=cache.agents,
                capacity=cache.capacity,
                bytes_per_sample=cache.bytes_per_sample,
            )
            for cache in system.caches.values()
            if cache.id in used
        },
        snapshots={
            snapshot.id: SnapshotPlan(
                cache=_cache(None, snapshot.agents), bytes_per_sample=snapshot.bytes_per_sample
            )
            for snapshot in system.snapshots.values()
        },
        steps=steps,
        sampling=system.sampling,
        limits=system.build.limits,
        fields=prompt_fields(agents.values()),
        stop_when=system.stop_when,
        speculation=system.speculation,
        tools=system.tools,
        serve=system.serve,
        date=system.date,
    )


def agent_plan(system: System, name: str, *, has_first: bool = True) -> AgentPlan:
    """Return an agent, without its `first` prompt if no step uses that."""
    agent = system.agents[name]
    is_remote = system.is_remote(name)
    return AgentPlan(
        backbone=agent.backbone if is_remote else system.backbone_of(name).name,
        system=agent.system,
        first=agent.first if has_first else None,
        then=agent.then,
        inner="" if is_remote else inner_link_id(name),
        latent_steps=agent.latent_steps,
        chat_template=agent.chat_template,
    )


def live_agents(program: Graph) -> tuple[str, ...]:
    """Return the agents that a bundle is about, in the order of declaration.

    These are the agents that steps run, and those that only have slots: an agent without latent
    steps sends empty messages and never runs.
    """
    system = program.system
    live: set[str] = set()
    for _, op in program.in_order():
        match op:
            case Prefill() | Ask():
                live.update(op.agents)
                for agent, variant in zip(op.agents, op.variants, strict=True):
                    live.update(system.agents[agent].slots(variant))
            case Think() | Write():
                live.update(op.agents)
            case Send():
                live.update((op.source, *op.targets))
            case Decode():
                live.add(op.agent)
    for agent in tuple(live):
        live.update(system.agents[agent].slots("then"))
    return tuple(name for name in system.agents if name in live)


def live_backbones(program: Graph) -> tuple[str, ...]:
    """Return the shared backbones that the live agents use, in the order of declaration."""
    local = program.system.local_agents
    used = {program.system.backbone_of(a).name for a in live_agents(program) if a in local}
    return tuple(name for name in program.system.backbones if name in used)


def live_remotes(program: Graph) -> tuple[str, ...]:
    """Return the remote models that the live agents use, in the order of declaration."""
    used = {program.system.agents[agent].backbone for agent in live_agents(program)}
    return tuple(name for name in program.system.remotes if name in used)


def _step(program: Graph, step: str, op: StepOp) -> Step:
    match op:
        case Prefill():
            source = None if op.prefix_of is None else program.op(op.prefix_of)
            assert source is None or isinstance(source, Prefill)
            return PrefillStep(
                round=op.round,
                agents=op.agents,
                variants=op.variants,
                messages=tuple(route_messages(program, step)),
                reuse_prefix=op.reuse is not None,
                cache=_cache(op.cache, op.agents),
                prefix_from=None if source is None else _cache(source.cache, source.agents),
                restore=op.restore,
                snapshots=op.snapshots,
            )
        case Think():
            return ThinkStep(
                round=op.round,
                agents=op.agents,
                fused=op.fused,
                cache=_cache(op.cache, op.agents),
            )
        case Write():
            return WriteStep(
                round=op.round,
                agents=op.agents,
                cache=_cache(op.cache, op.agents),
                max_new_tokens=op.max_tokens,
                greedy=True,
                keeps_states=op.keeps_states,
            )
        case Send():
            return SendStep(
                round=op.round,
                source=op.source,
                targets=op.targets,
                links=op.links,
                apply_inner=op.apply_inner,
            )
        case Ask():
            return AskStep(
                round=op.round,
                agents=op.agents,
                variants=op.variants,
                messages=tuple(route_messages(program, step)),
                max_new_tokens=op.max_tokens,
                greedy=op.max_tokens is not None,
                exits=find_exits(program) if op.max_tokens is None else (),
            )
        case Decode():
            return DecodeStep(
                round=op.round,
                agent=op.agent,
                cache=_cache(op.cache, (op.agent,)),
                exits=find_exits(program),
            )


def _cache(planned: str | None, agents: tuple[str, ...]) -> str:
    """Return the id of a step's cache: PlanCaches gives it this name, too."""
    return "+".join(agents) if planned is None else planned
