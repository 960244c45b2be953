"""The reference agrees with the naive form, whatever passes were run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from msgspec import structs

from kit.graphs import topology
from kit.models import FAMILIES, LoadTiny
from kit.systems import RECORDS, assert_agree, declare, naive_result, random_links, reference_result
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Level
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.lowering.reference import TorchSystem
from recmas_compiler.passes.pipeline import PIPELINE, run_pipeline

STEPS = 4

GRAPHS: dict[str, Callable[..., Graph]] = {
    "sequential": lambda **k: topology(
        "planner critic solver", "planner>critic critic>solver solver~>planner", rounds=3, **k
    ),
    "diamond": lambda **k: topology(
        "start left right end",
        "start>left start>right left>end right>end end~>start",
        rounds=2,
        **k,
    ),
    "self_loop": lambda **k: topology("solver", "solver~>solver", rounds=3, **k),
    "interlocked": lambda **k: topology("a b c d", "a>b b>c c~>a c>d d~>b", rounds=3, **k),
    "answers_in_the_middle": lambda **k: topology(
        "a b c", "a>b b>c c~>a", rounds=2, answer="b", **k
    ),
    "empty_messages": lambda **k: topology(
        "a b c", "a>b b>c a>c c~>a", rounds=2, steps_of={"a": 0}, **k
    ),
    "one_round": lambda **k: topology("a b", "a>b", rounds=1, **k),
}
OPTIONAL = [p for p in PIPELINE if p.name not in {"UnrollRounds", "PlanCaches"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_a_sequential_system(tiny: LoadTiny, family: str) -> None:
    backbone = tiny(family)
    graph = GRAPHS["sequential"](steps=STEPS, backbones=[declare("tiny", backbone)])
    links, backbones = random_links(graph), {"tiny": backbone}
    assert_agree(
        reference_result(run_pipeline(graph), backbones, links),
        naive_result(graph, backbones, links),
    )


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_graph_after_every_pass(tiny: LoadTiny, family: str, name: str) -> None:
    backbone = tiny(family)
    graph = GRAPHS[name](steps=STEPS, backbones=[declare("tiny", backbone)])
    links, backbones = random_links(graph), {"tiny": backbone}
    naive = naive_result(graph, backbones, links)
    seen = set()
    for end in range(len(PIPELINE) + 1):
        program = run_pipeline(graph, passes=PIPELINE[:end])
        if program.level >= Level.UNROLLED and print_graph(program) not in seen:
            seen.add(print_graph(program))
            assert_agree(reference_result(program, backbones, links), naive)


@pytest.mark.parametrize("left_out", OPTIONAL, ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["sequential", "diamond", "interlocked"])
def test_leaving_out_a_pass_changes_nothing(tiny: LoadTiny, name: str, left_out: object) -> None:
    backbone = tiny("qwen3")
    graph = GRAPHS[name](steps=STEPS, backbones=[declare("tiny", backbone)])
    links, backbones = random_links(graph), {"tiny": backbone}
    program = run_pipeline(graph, passes=tuple(p for p in PIPELINE if p is not left_out))
    assert_agree(reference_result(program, backbones, links), naive_result(graph, backbones, links))


@pytest.mark.parametrize("kind", ["residual", "ln_residual", "projected"])
def test_backbones_of_different_width(tiny: LoadTiny, kind: str) -> None:
    backbones = {"wide": tiny("llama"), "narrow": tiny("gemma3", hidden_size=48)}
    graph = topology(
        "a b c",
        "a>b b>c c~>a",
        rounds=2,
        steps=STEPS,
        kind=kind,
        backbones=[declare(name, backbone) for name, backbone in backbones.items()],
        backbone_of={"a": "wide", "b": "narrow", "c": "wide"},
    )
    links = random_links(graph)
    result = reference_result(run_pipeline(graph), backbones, links)
    assert_agree(result, naive_result(graph, backbones, links))
    assert result.messages["a->b@1"].shape == (len(RECORDS), STEPS, 48)
    assert result.messages["b->c@1"].shape == (len(RECORDS), STEPS, 64)


def test_equal_backbones_share_weights_after_the_pass(tiny: LoadTiny) -> None:
    backbone = tiny("mistral")
    graph = topology(
        "a b",
        "a>b b~>a",
        rounds=2,
        steps=STEPS,
        backbones=[declare("first", backbone), declare("second", backbone)],
        backbone_of={"a": "first", "b": "second"},
    )
    links = random_links(graph)
    result = reference_result(run_pipeline(graph), {"first": backbone}, links)
    assert_agree(result, naive_result(graph, {"first": backbone, "second": backbone}, links))


def test_a_sliding_window_over_every_layer(tiny: LoadTiny) -> None:
    backbone = tiny("mistral", sliding_window=8)
    graph = GRAPHS["sequential"](steps=STEPS, backbones=[declare("tiny", backbone)])
    links, backbones = random_links(graph), {"tiny": backbone}
    result = reference_result(run_pipeline(graph), backbones, links)
    assert_agree(result, naive_result(graph, backbones, links))
    unbounded = tiny("mistral")
    graph = GRAPHS["sequential"](steps=STEPS, backbones=[declare("tiny", unbounded)])
    assert naive_result(graph, {"tiny": unbounded}, links).token_ids != result.token_ids


def test_gradients_reach_every_link_that_matters_and_no_backbone(tiny: LoadTiny) -> None:
    backbone = tiny("qwen2")
    graph = GRAPHS["sequential"](steps=STEPS, backbones=[declare("tiny", backbone)])
    system = TorchSystem(
        run_pipeline(graph), backbones={"tiny": backbone}, links=random_links(graph)
    )
    assert system.train() is system
    assert not backbone.model.training
    state = system(RECORDS[0])
    state.sequences["solver"].hidden_11D.square().sum().backward()
    for name, parameter in system.named_parameters():
        if name.startswith("links."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None


def test_sampling_settings_are_followed(tiny: LoadTiny) -> None:
    backbone = tiny("phi3")
    graph = GRAPHS["one_round"](steps=STEPS, backbones=[declare("tiny", backbone)])
    program = run_pipeline(graph)
    system = TorchSystem(program, backbones={"tiny": backbone}, links=random_links(graph))
    plan = structs.replace(program.system.sampling, max_new_tokens=12)
    greedy = system.run(RECORDS, sampling=plan)
    drawn = system.run(RECORDS, sampling=structs.replace(plan, temperature=1.5, seed=3))
    again = system.run(RECORDS, sampling=structs.replace(plan, temperature=1.5, seed=3))
    other = system.run(RECORDS, sampling=structs.replace(plan, temperature=1.5, seed=4))
    assert drawn.token_ids == again.token_ids
    assert drawn.token_ids != greedy.token_ids
    assert drawn.token_ids != other.token_ids
    assert greedy.finish_reasons[0] == "length"
    stop = greedy.texts[0][3:5]
    stopped = system.run(RECORDS[:1], sampling=structs.replace(plan, stop=(stop,)))
    assert stopped.texts == [greedy.texts[0].partition(stop)[0]]
    assert stopped.finish_reasons == ["stop"]


def test_an_answer_ends_at_an_end_token(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = GRAPHS["one_round"](steps=STEPS, backbones=[declare("tiny", backbone)])
    links = random_links(graph)
    written = reference_result(run_pipeline(graph), {"tiny": backbone}, links).token_ids[0]
    ending = replace(backbone, eos_token_ids=(written[3],))
    for result in (
        reference_result(run_pipeline(graph), {"tiny": ending}, links),
        naive_result(graph, {"tiny": ending}, links),
    ):
        assert result.token_ids[0] == written[: written.index(written[3])]
        assert result.finish_reasons[0] == "stop"


def test_running_keeps_no_gradients(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    graph = GRAPHS["one_round"](steps=STEPS, backbones=[declare("tiny", backbone)])
    result = reference_result(run_pipeline(graph), {"tiny": backbone}, random_links(graph))
    assert all(not m.requires_grad for m in result.messages.values())
    assert torch.isfinite(result.messages["a->b@1"]).all()
