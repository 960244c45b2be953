"""Every rule of the IR is broken once, on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kit.graphs import EXAMPLES, backbone, diamond, mixture, remote, sequential, stateful, topology
from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import Cache, Decode, Flow, Level, NodeOp, Prefill, Send, Think
from recmas_compiler.ir.verify import RULES, verify
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.passes.unroll_rounds import UnrollRounds
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.messages import MessageForm


def unrolled(graph: Graph | None = None) -> Graph:
    return UnrollRounds()(graph or sequential())


def planned(graph: Graph | None = None) -> Graph:
    return run_pipeline(graph or sequential())


def planned_with_states() -> Graph:
    links = "planner>critic critic>solver solver~>planner"
    return planned(topology("planner critic solver", links, backbones=(stateful("state"),)))


ROWS_OF_LAYER_99 = MessageForm(carries="cache", rows=("context",), layers=(99,))


def writing() -> Graph:
    """Return a topology whose planner writes to the critic."""
    form = MessageForm(carries="text", max_tokens=8)
    graph = sequential()
    link = replace(graph.system.links["planner->critic"], weights=None, form=form)
    edges = tuple(
        replace(e, op=link) if (e.source, e.target) == ("planner", "critic") else e
        for e in graph.edges()
    )
    links = graph.system.links | {link.id: link}
    return graph.replaced(system=replace(graph.system, links=links), edges=edges)


def with_op(graph: Graph, node: str, **changes: Any) -> Graph:
    return graph.replaced(nodes=graph.nodes() | {node: replace(graph.op(node), **changes)})


def with_node(graph: Graph, node: str, op: NodeOp, *edges: Edge) -> Graph:
    return graph.replaced(nodes=graph.nodes() | {node: op}, edges=(*graph.edges(), *edges))


def without_edge(graph: Graph, source: str, target: str) -> Graph:
    kept = tuple(e for e in graph.edges() if (e.source, e.target) != (source, target))
    return graph.replaced(edges=kept)


def with_system(graph: Graph, **changes: Any) -> Graph:
    return graph.replaced(system=replace(graph.system, **changes))


def with_agent(graph: Graph, name: str, **changes: Any) -> Graph:
    """Change an agent in the table and, in a topology, in its node."""
    agent = replace(graph.system.agents[name], **changes)
    changed = with_system(graph, agents=graph.system.agents | {name: agent})
    if graph.level is Level.TOPOLOGY:
        return changed.replaced(nodes=changed.nodes() | {name: agent})
    return changed


def with_link(graph: Graph, link_id: str, **changes: Any) -> Graph:
    """Change a link in the table only."""
    link = replace(graph.system.links[link_id], **changes)
    return with_system(graph, links=graph.system.links | {link_id: link})


def with_cache(graph: Graph, cache_id: str, **changes: Any) -> Graph:
    cache = replace(graph.system.caches[cache_id], **changes)
    return with_system(graph, caches=graph.system.caches | {cache_id: cache})


def with_backbone(graph: Graph, name: str, **changes: Any) -> Graph:
    changed = replace(graph.system.backbones[name], **changes)
    return with_system(graph, backbones=graph.system.backbones | {name: changed})


def no_flow_back() -> Graph:
    """A program in which round 2 could overtake round 1, inserted so that it does."""
    program = unrolled(topology("a b", "a>b", rounds=2))
    second_round_first = sorted(program.nodes().items(), key=lambda item: -item[1].round)  # type: ignore[union-attr]
    return program.replaced(nodes=dict(second_round_first))


def cyclic() -> Graph:
    message = Flow(carries="message")
    back = Edge("r1/planner->critic/send", "r1/planner/prefill", message)
    return with_node(unrolled(), "r1/planner/prefill", unrolled().op("r1/planner/prefill"), back)


def missing_decode() -> Graph:
    program = unrolled()
    kept = {step: op for step, op in program.nodes().items() if not isinstance(op, Decode)}
    edges = tuple(e for e in program.edges() if e.target in kept)
    return program.replaced(nodes=kept, edges=edges)


def second_prefill() -> Graph:
    extra = Prefill(agents=("planner",), round=3, variants=("then",))
    return with_node(unrolled(), "r3/planner/again", extra)


def prefix_beside_own_rows() -> Graph:
    """The critic has rows of its own from round 1, and copies the planner's all the same."""
    source, target = "r1/planner/prefill", "r2/critic/prefill"
    graph = with_op(planned(), target, prefix_of=source)
    edge = Edge(source, target, Flow(carries="cache"))
    return graph.replaced(edges=(*graph.edges(), edge))


def batch_of_two_backbones() -> Graph:
    tables = (backbone("one"), backbone("two", identity="two", source="two"))
    homes = {"left": "one", "right": "two"}
    graph = planned(diamond())
    assert graph.system.caches.keys() >= {"left+right"}
    agents = {n: replace(a, backbone=homes.get(n, "one")) for n, a in graph.system.agents.items()}
    return with_system(graph, backbones={b.name: b for b in tables}, agents=agents)


def uneven_fan_out() -> Graph:
    tables = (backbone("one"), backbone("two", identity="two", source="two", width=64))
    links = "start>left start>right left>end right>end"
    graph = unrolled(
        topology(
            "start left right end",
            links,
            rounds=1,
            backbones=tables,
            backbone_of={"right": "two"},
        )
    )
    joined = Send(source="start", targets=("left", "right"), round=1)
    edges = tuple(
        replace(edge, source="joined") if edge.source.startswith("r1/start->") else edge
        for edge in graph.edges()
        if not edge.target.startswith("r1/start->")
    )
    nodes = {s: op for s, op in graph.nodes().items() if not s.startswith("r1/start->")}
    into = Edge("r1/start/think", "joined", Flow(carries="thoughts"))
    return graph.replaced(nodes=nodes | {"joined": joined}, edges=(*edges, into))


def two_caches() -> Graph:
    graph = planned(mixture())
    spare = replace(graph.system.caches["summarizer"], id="spare", agents=("math",))
    return with_system(graph, caches=graph.system.caches | {"spare": spare})


SYSTEM_BREAKERS: dict[str, Callable[[], Graph]] = {
    "names_resolve": lambda: with_system(sequential(), answer_agent="nobody"),
    "remotes_speak_text": lambda: with_system(sequential(), remotes={"smol": remote("smol")}),
    "equal_share": lambda: with_system(
        sequential(),
        backbones={
            "smol": backbone("smol"),
            "tall": replace(backbone("tall", identity="other"), shared_as="smol"),
        },
    ),
    "bounds": lambda: with_system(sequential(), rounds=65),
    "known_dtype": lambda: with_backbone(sequential(), "smol", dtype="float3"),
    "known_precision": lambda: with_backbone(sequential(), "smol", precision="int3"),
    "link_widths": lambda: with_backbone(
        sequential(), "smol", facts=replace(backbone("smol").facts, width=64)
    ),
    "rows_can_be_taken": lambda: with_link(
        sequential(), "planner->critic", weights=None, form=ROWS_OF_LAYER_99
    ),
    "slots_have_links": lambda: with_agent(
        sequential(), "planner", then=sequential().system.agents["solver"].then
    ),
    "links_have_slots": lambda: with_agent(sequential(), "planner", then=()),
    "first_is_filled": lambda: with_agent(
        sequential(), "planner", first=sequential().system.agents["planner"].then
    ),
}

TOPOLOGY_BREAKERS: dict[str, Callable[[], Graph]] = {
    "nodes_are_agents": lambda: with_op(sequential(), "planner", latent_steps=5),
    "edges_are_links": lambda: without_edge(sequential(), "planner", "critic"),
    "cycles_by_feedback": lambda: topology("a b c", "a>b b>a a>c"),
    "no_caches_yet": lambda: with_system(sequential(), caches=planned().system.caches),
}

PROGRAM_BREAKERS: dict[str, Callable[[], Graph]] = {
    "nodes_are_steps": lambda: with_node(unrolled(), "planner", sequential().op("planner")),
    "steps_resolve": lambda: with_op(unrolled(), "r1/planner/think", agents=("nobody",)),
    "flow_kinds": lambda: with_node(
        unrolled(),
        "r1/planner/think",
        unrolled().op("r1/planner/think"),
        Edge("r1/planner/think", "r1/critic/prefill", Flow(carries="message")),
    ),
    "acyclic": cyclic,
    "one_decode": missing_decode,
    "rounds_in_bounds": lambda: with_op(unrolled(), "r1/planner/think", round=4),
    "rounds_in_order": no_flow_back,
    "one_turn_a_round": second_prefill,
    "steps_have_origin": lambda: without_edge(unrolled(), "r1/planner/prefill", "r1/planner/think"),
    "num_steps": lambda: with_agent(unrolled(), "critic", latent_steps=0),
    "batches": batch_of_two_backbones,
    "texts": lambda: with_op(unrolled(writing()), "r1/planner/write", max_tokens=9),
    "even_fan_out": uneven_fan_out,
    "inner_once": lambda: with_op(unrolled(), "r1/planner->critic/send", apply_inner=False),
    "variants": lambda: with_op(unrolled(), "r1/planner/prefill", variants=("then",)),
    "messages": lambda: without_edge(unrolled(), "r1/solver->planner/send", "r2/planner/prefill"),
    "reuse": lambda: with_op(planned(), "r3/planner/prefill", reuse="r1/planner/prefill"),
    "prefixes": prefix_beside_own_rows,
    "snapshots": lambda: with_op(planned_with_states(), "r1/planner/prefill", snapshots=()),
}

PLANNED_BREAKERS: dict[str, Callable[[], Graph]] = {
    "caches_resolve": lambda: with_cache(planned(), "critic", backbone="nothing"),
    "steps_have_caches": lambda: with_op(planned(), "r1/critic/think", cache="solver"),
    "caches_not_shared": two_caches,
    "caches_cover": lambda: with_cache(planned(), "solver", capacity=576),
    "cache_lifetimes": lambda: with_cache(planned(), "critic", last_step="r1/critic/think"),
}

BREAKERS = SYSTEM_BREAKERS | TOPOLOGY_BREAKERS | PROGRAM_BREAKERS | PLANNED_BREAKERS


def test_every_rule_is_broken_once() -> None:
    names = [rule.name for rules in RULES.values() for rule in rules]
    assert BREAKERS.keys() == set(names)


@pytest.mark.parametrize("rule", BREAKERS)
def test_rule(rule: str) -> None:
    with pytest.raises(RecmasError) as caught:
        verify(BREAKERS[rule](), at="after SomePass")
    problem = caught.value.problems[0]
    assert problem.code == "RM204"
    assert problem.message.startswith(f"after SomePass, rule {rule} of level ")


def test_message_names_rule_place_and_pass() -> None:
    broken = with_op(unrolled(), "r2/planner->critic/send", apply_inner=False)
    with pytest.raises(RecmasError) as caught:
        verify(broken, at="after UnrollRounds")
    assert str(caught.value) == (
        "error[RM204]: after UnrollRounds, rule inner_once of level UNROLLED is broken at "
        "r2/planner->critic/send: the inner link is in the Think or in the Send. This is a bug "
        "in recmas or in a pass of yours; --dump-ir DIR shows which pass."
    )


def test_all_places_of_the_first_broken_rule_are_named() -> None:
    broken = with_op(unrolled(), "r2/planner->critic/send", apply_inner=False)
    broken = with_op(broken, "r1/planner->critic/send", apply_inner=False)
    with pytest.raises(RecmasError) as caught:
        verify(broken, at="after UnrollRounds")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_hold_all_rules(name: str) -> None:
    graph = EXAMPLES[name]()
    verify(graph, at="at first")
    for pass_ in PIPELINE:
        graph = pass_(graph)
        verify(graph, at=f"after {pass_.name}")


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("r3/planner/prefill", {"restore": "critic"}),
        ("r3/planner/prefill", {"restore": None}),
        ("r3/planner/prefill", {"snapshots": ("planner",)}),
        ("r1/planner/prefill", {"restore": "planner"}),
    ],
)
def test_snapshots_fit_the_rows_that_are_kept(step: str, changes: dict[str, Any]) -> None:
    verify(planned_with_states(), at="at first")
    with pytest.raises(RecmasError, match="rule snapshots"):
        verify(with_op(planned_with_states(), step, **changes), at="last")


def test_rows_have_no_snapshots() -> None:
    graph = planned_with_states()
    rows = backbone("state")
    with pytest.raises(RecmasError, match="rule snapshots"):
        verify(with_system(graph, backbones={"state": rows}), at="last")


def test_cache_that_no_step_uses_is_refused() -> None:
    graph = planned(sequential())
    think = graph.op("r1/planner/think")
    assert isinstance(think, Think)
    idle = Cache(
        id="idle",
        backbone="smol",
        agents=(),
        capacity=64,
        bytes_per_sample=0,
        first_step="r1/planner/think",
        last_step="r1/planner/think",
    )
    with pytest.raises(RecmasError, match="caches_resolve"):
        verify(with_system(graph, caches=graph.system.caches | {"idle": idle}), at="last")
