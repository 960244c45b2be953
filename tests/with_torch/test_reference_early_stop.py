"""Early end of the rounds: the reference and the naive form stop at the same place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from msgspec import structs

from kit.graphs import topology
from kit.models import LoadTiny
from kit.naive import run_naive
from kit.systems import MAX_NEW_TOKENS, RECORDS, assert_agree, declare, naive_result, random_links
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.reference import ReferenceResult, TorchSystem
from recmas_compiler.passes.pass_base import Pass
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline
from recmas_runtime.formats.plan import StopPlan

ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A graph, and the links whose messages the answer depends on."""

    make: Callable[..., Graph]
    heard: tuple[str, ...]


def case(agents: str, links: str, *heard: str) -> Case:
    return Case(make=lambda **k: topology(agents, links, rounds=ROUNDS, **k), heard=heard)


CASES = {
    "self_loop": case("solver", "solver~>solver", "solver->solver"),
    "sequential": case(
        "planner critic solver",
        "planner>critic critic>solver solver~>planner",
        "planner->critic",
        "critic->solver",
        "solver->planner",
    ),
    "mixture": case("a b end", "a>end b>end end~>a end~>b", "a->end", "b->end", "end->a", "end->b"),
    # what `deaf` is told changes nothing, so it must not keep a record from settling
    "unheard": case("a deaf end", "a>end end~>a a>deaf", "a->end", "end->a"),
    # what `late` says is heard in the last round only, so no earlier round can be the last but one
    "awaited": case("late a end", "a>end a~>a late~>end"),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What two ways of running give for a single record."""

    reference: ReferenceResult
    naive: ReferenceResult


def run(
    graph: Graph, backbone: TorchBackbone, record: dict[str, str], passes: tuple[Pass, ...]
) -> Found:
    links, backbones = random_links(graph), {"tiny": backbone}
    program = run_pipeline(graph, passes=passes)
    sampling = structs.replace(program.system.sampling, max_new_tokens=MAX_NEW_TOKENS)
    reference = TorchSystem(program, backbones=backbones, links=links)
    return Found(
        reference=reference.run([record], sampling=sampling),
        naive=run_naive(
            graph, [record], backbones=backbones, links=links, max_new_tokens=MAX_NEW_TOKENS
        ),
    )


def make(tiny: LoadTiny, case: Case, stop: StopPlan | None = None) -> tuple[Graph, TorchBackbone]:
    backbone = tiny("llama")
    graph = case.make(steps=4, backbones=[declare("tiny", backbone)])
    return graph.replaced(system=replace(graph.system, stop_when=stop)), backbone


def bound_between_records(tiny: LoadTiny, case: Case) -> StopPlan:
    """Return a bound that one record reaches in round 2 and the other does not."""
    graph, backbone = make(tiny, case)
    messages = naive_result(graph, {"tiny": backbone}, random_links(graph)).messages
    cosines_B = torch.stack(
        [
            torch.cosine_similarity(messages[f"{link}@2"], messages[f"{link}@1"], dim=-1).mean(-1)
            for link in case.heard
        ]
    ).amin(0)
    low, high = sorted(cosines_B.tolist())
    assert high - low > 1e-4, "records that are alike prove nothing"
    return StopPlan(cosine=(low + high) / 2)


@pytest.mark.parametrize("name", [name for name in CASES if name != "awaited"])
def test_reference_and_naive_form_stop_at_the_same_place(tiny: LoadTiny, name: str) -> None:
    stop = bound_between_records(tiny, CASES[name])
    graph, backbone = make(tiny, CASES[name], stop)
    rounds = set()
    for record in RECORDS:
        found = run(graph, backbone, record, PIPELINE)
        assert_agree(found.reference, found.naive)
        assert found.reference.rounds == found.naive.rounds
        (num_rounds,) = found.naive.rounds
        rounds.add(num_rounds)
        ran = {*range(1, num_rounds), ROUNDS}
        for result in (found.reference, found.naive):
            assert {int(name.partition("@")[2]) for name in result.messages} <= ran
    assert min(rounds) == 3
    assert 3 < max(rounds) < ROUNDS


@pytest.mark.parametrize("name", ["sequential", "mixture", "unheard"])
def test_no_pass_changes_where_a_record_stops(tiny: LoadTiny, name: str) -> None:
    graph, backbone = make(tiny, CASES[name], bound_between_records(tiny, CASES[name]))
    for end in range(2, len(PIPELINE) + 1):
        for record in RECORDS:
            found = run(graph, backbone, record, PIPELINE[:end])
            assert found.reference.rounds == found.naive.rounds, PIPELINE[:end]
            assert found.reference.token_ids == found.naive.token_ids


def test_no_early_end_without_the_messages_that_the_last_round_awaits(tiny: LoadTiny) -> None:
    graph, backbone = make(tiny, CASES["awaited"], StopPlan(cosine=0.1))
    found = run(graph, backbone, RECORDS[0], PIPELINE)
    assert found.reference.rounds == found.naive.rounds == [ROUNDS]
    assert_agree(found.reference, found.naive)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_few_rounds_all_run(tiny: LoadTiny, rounds: int) -> None:
    graph, backbone = make(tiny, CASES["sequential"], StopPlan(cosine=0.1))
    graph = graph.replaced(system=replace(graph.system, rounds=rounds))
    found = run(graph, backbone, RECORDS[0], PIPELINE)
    assert found.reference.rounds == found.naive.rounds == [rounds]
    assert_agree(found.reference, found.naive)


def test_gradients_pass_through_the_rounds_that_ran(tiny: LoadTiny) -> None:
    graph, backbone = make(tiny, CASES["sequential"], StopPlan(cosine=0.1))
    system = TorchSystem(
        run_pipeline(graph), backbones={"tiny": backbone}, links=random_links(graph)
    )
    state = system(RECORDS[0])
    assert state.converged_in == 2
    state.sequences["solver"].hidden_11D.square().sum().backward()
    for name, parameter in system.named_parameters():
        if name.startswith("links."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
