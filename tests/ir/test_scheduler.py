"""The passes on random graphs: rules hold after each of them and the answer stays the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.graphs import EXAMPLES, backbone, stateful, topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Decode, Level
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.passes.batch_parallel_agents import BatchParallelAgents
from recmas_compiler.passes.fuse_links import FuseLinks
from recmas_compiler.passes.pass_base import RecordPasses, VerifyPasses
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_compiler.passes.plan_caches import PlanCaches
from recmas_compiler.passes.prompt_prefix import HoistPromptPrefix, SharePromptPrefix
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_compiler.passes.share_backbones import ShareBackbones
from recmas_compiler.passes.unroll_rounds import UnrollRounds
from semantics import Symbols, naive_answer, program_answer

BACKBONES = (
    backbone("one"),
    backbone("same", identity="builtin:smollm2-135m-instruct", source="folder"),
    backbone("other", identity="other", source="other", width=64),
    stateful("recurrent", identity="recurrent"),
)


@st.composite
def topologies(draw: st.DrawFn) -> Graph:
    """Draw up to 8 agents, declared in any order, with any forward and feedback links."""
    count = draw(st.integers(1, 8))
    names = [f"n{i}" for i in range(count)]
    pairs = list(itertools.product(range(count), repeat=2))
    forward = draw(st.sets(st.sampled_from(pairs), max_size=14))
    links = [f"{names[a]}>{names[b]}" for a, b in sorted(forward) if a < b]
    others = [pair for pair in pairs if pair not in forward or pair[0] >= pair[1]]
    feedback = draw(st.sets(st.sampled_from(others), max_size=8)) if others else set()
    links += [f"{names[a]}~>{names[b]}" for a, b in sorted(feedback)]
    declared = draw(st.permutations(names))
    return topology(
        " ".join(declared),
        " ".join(draw(st.permutations(links))),
        rounds=draw(st.integers(1, 4)),
        answer=draw(st.sampled_from(names)),
        steps_of={name: draw(st.sampled_from((0, 1, 4, 4))) for name in names},
        backbones=BACKBONES,
        backbone_of={
            name: draw(st.sampled_from(("one", "one", "same", "other", "recurrent")))
            for name in names
        },
        role=draw(st.sampled_from(("You are the {name}.", "You are one of several."))),
        kind_of={
            f"{a}->{b}": draw(st.sampled_from(("projected", "residual", "ln_residual")))
            for a, b in draw(st.sets(st.sampled_from(list(itertools.product(names, names)))))
        },
    )


@settings(max_examples=300, deadline=None)
@given(topologies())
def test_every_pass_keeps_the_rules_and_the_answer(graph: Graph) -> None:
    symbols = Symbols()
    expected = naive_answer(graph, symbols)
    record = RecordPasses()
    run_pipeline(graph, instruments=(VerifyPasses(), record))
    for step in record.records:
        if step.after.level is not Level.TOPOLOGY:
            assert program_answer(step.after, symbols) == expected, f"after {step.name}"
            assert list(step.after.nodes()) == step.after.order(), "inserted as executed"


@settings(max_examples=150, deadline=None)
@given(topologies(), st.sets(st.integers(0, 5)))
def test_any_part_of_the_pipeline_is_right(graph: Graph, chosen: set[int]) -> None:
    optional = (
        ShareBackbones(),
        RemoveDeadSteps(),
        HoistPromptPrefix(),
        FuseLinks(),
        BatchParallelAgents(),
        SharePromptPrefix(),
    )
    kept = {optional[i].name for i in chosen} | {"UnrollRounds", "PlanCaches"}
    passes = tuple(p for p in PIPELINE if p.name in kept)
    symbols = Symbols()
    program = run_pipeline(graph, passes=passes, instruments=(VerifyPasses(),))
    assert program_answer(program, symbols) == naive_answer(graph, symbols)


@settings(max_examples=100, deadline=None)
@given(topologies(), st.data())
def test_program_passes_are_right_in_any_order(graph: Graph, data: st.DataObject) -> None:
    middle = (RemoveDeadSteps(), HoistPromptPrefix(), FuseLinks(), BatchParallelAgents())
    order = data.draw(st.permutations(middle))
    symbols = Symbols()
    program = run_pipeline(
        graph,
        passes=(ShareBackbones(), UnrollRounds(), *order, SharePromptPrefix(), PlanCaches()),
        instruments=(VerifyPasses(),),
    )
    assert program_answer(program, symbols) == naive_answer(graph, symbols)


@settings(max_examples=100, deadline=None)
@given(topologies())
def test_passes_are_deterministic_and_done_after_one_run(graph: Graph) -> None:
    assert print_graph(run_pipeline(graph)) == print_graph(run_pipeline(graph))
    current = graph
    for pass_ in PIPELINE:
        current = pass_(current)
        if pass_.requires is pass_.ensures:
            assert pass_(current) is current, f"{pass_!r} changes its own result"


@settings(max_examples=100, deadline=None)
@given(topologies())
def test_nothing_dead_is_left(graph: Graph) -> None:
    program = run_pipeline(graph)
    (decode,) = [step for step, op in program.nodes().items() if isinstance(op, Decode)]
    assert program.ancestors(decode) | {decode} == set(program.nodes())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_keep_the_answer(name: str) -> None:
    graph = EXAMPLES[name]()
    symbols = Symbols()
    assert program_answer(run_pipeline(graph), symbols) == naive_answer(graph, symbols)
