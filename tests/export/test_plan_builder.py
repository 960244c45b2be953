"""Program IR to plan: nothing is lost, nothing is there that is not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.bundles import compile_system, write_twins
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.plan import build_plan, live_agents, live_backbones
from recmas_runtime.formats.codec import from_json, to_json
from recmas_runtime.formats.plan import (
    DecodeStep,
    LinkPlan,
    Message,
    Plan,
    PrefillStep,
    SendStep,
    SentMessage,
    StopPlan,
    ThinkStep,
    ToolsPlan,
    feedback_links,
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twins(tmp_path_factory.mktemp("system"))


def program(system: Path, *overrides: str) -> Graph:
    return compile_system(system, *overrides)[1]


def test_steps_in_order(system: Path) -> None:
    plan = build_plan(program(system))
    assert [(step.op, step.round) for step in plan.steps] == [
        *[(op, 1) for _ in range(3) for op in ("prefill", "think", "send")],
        *[(op, 2) for _ in range(2) for op in ("prefill", "think", "send")],
        ("prefill", 2),
        ("decode", 2),
    ]
    assert plan.steps[0] == PrefillStep(
        round=1,
        agents=("planner",),
        variants=("first",),
        messages=(),
        reuse_prefix=False,
        cache="planner",
    )
    assert plan.steps[1] == ThinkStep(round=1, agents=("planner",), fused=True, cache="planner")
    assert plan.steps[2] == SendStep(
        round=1,
        source="planner",
        targets=("critic",),
        links=("planner->critic",),
        apply_inner=False,
    )
    assert plan.steps[9] == PrefillStep(
        round=2,
        agents=("planner",),
        variants=("then",),
        messages=(Message(agent="planner", slot="solver", link="solver->planner", round=1),),
        reuse_prefix=True,
        cache="planner",
    )
    assert plan.steps[-1] == DecodeStep(round=2, agent="solver", cache="solver")


def test_tables(system: Path) -> None:
    plan = build_plan(program(system))
    assert plan.name == "pair"
    assert plan.rounds == 2
    assert plan.answer_agent == "solver"
    assert list(plan.agents) == ["planner", "critic", "solver"]
    assert {name: agent.backbone for name, agent in plan.agents.items()} == {
        "planner": "small",
        "critic": "other",
        "solver": "small",  # shared: `twin` is the same model
    }
    assert {name: agent.inner for name, agent in plan.agents.items()} == {
        name: f"{name}.inner" for name in plan.agents
    }
    assert plan.fields == ("question", "day", "hint")
    assert plan.links == {
        f"{source}->{target}": LinkPlan(source=source, target=target, carries="thoughts")
        for source, target in (("planner", "critic"), ("critic", "solver"), ("solver", "planner"))
    }
    assert feedback_links(plan) == {"solver->planner"}
    assert plan.limits.max_prompt_tokens == 96
    assert plan.sampling.max_new_tokens == 8
    for cache in plan.caches.values():
        assert cache.capacity % 64 == 0


def test_first_prompt_only_where_it_is_used(system: Path) -> None:
    plan = build_plan(program(system))
    assert plan.agents["planner"].first is not None
    assert plan.agents["solver"].first is None


def test_one_round_has_no_feedback(system: Path) -> None:
    plan = build_plan(program(system, "rounds=1"))
    assert feedback_links(plan) == frozenset()
    assert set(plan.links) == {"planner->critic", "critic->solver"}
    assert plan.agents["planner"].first is not None


def test_agents_without_latent_steps_stay_as_names(system: Path) -> None:
    """Their messages are empty and they never run, but prompts have slots for them."""
    graph = program(system, "agents.critic.latent_steps=0")
    plan = build_plan(graph)
    assert "critic" in plan.agents
    assert not any("critic" in step.agents for step in plan.steps if isinstance(step, ThinkStep))
    assert set(live_agents(graph)) == set(plan.agents)


def test_shared_backbones_count_once(system: Path) -> None:
    assert live_backbones(program(system)) == ("small", "other")


def test_early_end_and_tools(system: Path) -> None:
    assert build_plan(program(system)).stop_when is None
    assert build_plan(program(system)).tools is None
    overrides = ("answer.stop_when.cosine=0.9", "answer.tools.functions=[lookup]")
    plan = build_plan(program(system, *overrides))
    assert plan.stop_when == StopPlan(cosine=0.9)
    assert plan.tools == ToolsPlan(functions=("lookup",))
    assert from_json(Plan, to_json(plan), file="plan.json") == plan


def test_exits_are_what_the_last_round_takes_from_the_round_before(system: Path) -> None:
    def exits(*overrides: str) -> object:
        decode = build_plan(program(system, *overrides)).steps[-1]
        assert isinstance(decode, DecodeStep)
        return decode.exits

    assert exits("rounds=4") == (SentMessage(link="solver->planner", round=3),)
    # Of two rounds the first has none before it to be compared with.
    assert exits("rounds=2") == ()


def test_plan_survives_its_format(system: Path) -> None:
    plan = build_plan(program(system))
    assert from_json(Plan, to_json(plan), file="plan.json") == plan
