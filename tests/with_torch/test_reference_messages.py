"""The reference and the naive form agree on messages of every kind, family by family."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kit.graphs import topology, with_forms
from kit.models import FAMILIES, LoadTiny
from kit.systems import assert_agree, declare, naive_result, random_links, reference_result
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_runtime.formats.messages import MessageForm
from recmas_runtime.formats.plan import StopPlan

CONTEXT = MessageForm(carries="context")
TEXT = MessageForm(carries="text", max_tokens=5)
WRITTEN = MessageForm(carries="written", max_tokens=5)


def rows(*kinds: str, max_tokens: int | None = None) -> MessageForm:
    return MessageForm(carries="cache", rows=kinds, max_tokens=max_tokens)


def assert_all_agree(graph: Graph, backbone: TorchBackbone) -> Graph:
    links, backbones = random_links(graph), {"tiny": backbone}
    naive = naive_result(graph, backbones, links)
    program = run_pipeline(graph)
    assert_agree(reference_result(program, backbones, links), naive)
    return program


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sends_every_kind(tiny: LoadTiny, family: str) -> None:
    backbone = tiny(family)
    graph = topology(
        "a b c d e",
        "a>b a>c b>d c>d d>e d~>a",
        rounds=2,
        steps=3,
        backbones=[declare("tiny", backbone)],
    )
    graph = with_forms(
        graph, a_b=CONTEXT, a_c=MessageForm(carries="context", of="question", every=3)
    )
    graph = with_forms(graph, b_d=TEXT, c_d=WRITTEN, d_a=MessageForm(carries="context", pool=True))
    assert_all_agree(graph, backbone)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hands_over_rows(tiny: LoadTiny, family: str) -> None:
    backbone = tiny(family)
    graph = topology(
        "a b c",
        "a>b a>c b>c",
        rounds=1,
        steps=3,
        backbones=[declare("tiny", backbone)],
    )
    graph = with_forms(graph, a_b=rows("context", "thoughts"))
    graph = with_forms(graph, a_c=rows("prompt"), b_c=rows("context", "written", max_tokens=4))
    assert_all_agree(graph, backbone)


def test_rows_behind_a_window_of_every_layer(tiny: LoadTiny) -> None:
    backbone = tiny("mistral", sliding_window=8)
    graph = topology("a b c", "a>c b>c", rounds=1, steps=3, backbones=[declare("tiny", backbone)])
    graph = with_forms(graph, a_c=rows("context"), b_c=rows("context", "thoughts"))
    assert_all_agree(graph, backbone)


@pytest.mark.parametrize("form", [TEXT, CONTEXT, rows("context")], ids=lambda f: f.carries)
def test_no_early_end_without_the_message_that_the_last_round_awaits(
    tiny: LoadTiny, form: MessageForm
) -> None:
    """What `late` says is heard in the last round only, so no earlier one can be the last but one.

    Its message is not among those that are compared, but it must be there all the same.
    """
    backbone = tiny("llama")
    graph = topology(
        "late a end",
        "a>end a~>a end~>a late~>end",
        rounds=5,
        steps=3,
        backbones=[declare("tiny", backbone)],
    )
    # `end` sends nothing without steps: it is not heard but in its answer.
    agents = {**graph.system.agents, "end": replace(graph.system.agents["end"], latent_steps=0)}
    graph = graph.replaced(
        system=replace(graph.system, agents=agents, stop_when=StopPlan(cosine=0.1)), nodes=agents
    )
    graph = with_forms(graph, late_end=form)
    links, backbones = random_links(graph), {"tiny": backbone}
    found = reference_result(run_pipeline(graph), backbones, links)
    naive = naive_result(graph, backbones, links)
    assert found.rounds == naive.rounds == [5, 5]
    assert_agree(found, naive)
