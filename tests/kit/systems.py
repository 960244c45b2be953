"""Small systems on tiny backbones, with links drawn at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from msgspec import structs
from torch import nn

from kit.naive import run_naive
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Backbone
from recmas_compiler.links.modules import make_link, randomize
from recmas_compiler.lowering.reference import ReferenceResult, TorchSystem
from recmas_compiler.spec.document.places import UNKNOWN
from recmas_runtime.formats.ids import inner_link_id

RECORDS = [
    {"id": "1", "question": "What is 7 * 8?"},
    {"id": "2", "question": "Anna has three plans. Which is the best one, and why?"},
]
MAX_NEW_TOKENS = 10
MESSAGE_TOLERANCE = 1e-4


def declare(name: str, backbone: TorchBackbone) -> Backbone:
    return Backbone(name=name, facts=backbone.facts, dtype="float32", shared_as=name, where=UNKNOWN)


def random_links(graph: Graph) -> dict[str, nn.Module]:
    """Return a link of the declared kind for every agent, and for every edge of vectors."""
    links = {}
    for name, agent in graph.system.agents.items():
        inner = agent.inner
        links[inner_link_id(name)] = make_link(inner.kind, "inner", inner.in_dim, inner.out_dim)
    for link_id, link in graph.system.links.items():
        outer = link.weights
        if outer is None:
            continue
        links[link_id] = make_link(outer.kind, "outer", outer.in_dim, outer.out_dim)
    for link_id, module in links.items():
        randomize(module, link_id=link_id)
    return links


def naive_result(
    topology: Graph, backbones: Mapping[str, TorchBackbone], links: Mapping[str, nn.Module]
) -> ReferenceResult:
    return run_naive(
        topology, RECORDS, backbones=backbones, links=links, max_new_tokens=MAX_NEW_TOKENS
    )


def reference_result(
    program: Graph, backbones: Mapping[str, TorchBackbone], links: Mapping[str, nn.Module]
) -> ReferenceResult:
    system = TorchSystem(program, backbones=backbones, links=links)
    sampling = structs.replace(program.system.sampling, max_new_tokens=MAX_NEW_TOKENS)
    return system.run(RECORDS, sampling=sampling)


def assert_agree(result: ReferenceResult, naive: ReferenceResult) -> None:
    """Every message that the program sends is the naive one's, and the answers are equal."""
    for found, expected in ((result.messages, naive.messages), (result.thoughts, naive.thoughts)):
        for name, tensor in found.items():
            other = expected[name]  # shorter messages than others of a batch end in NaN
            assert torch.equal(tensor.isnan(), other.isnan()), name
            error = (tensor - other).nan_to_num().abs().max().item()
            assert error <= MESSAGE_TOLERANCE, f"{name} is off by {error}"
    for texts, expected in zip(result.handover_texts, naive.handover_texts, strict=True):
        assert texts == {name: expected[name] for name in texts}
    assert result.token_ids == naive.token_ids
    assert result.texts == naive.texts
    assert result.finish_reasons == naive.finish_reasons
    for texts in result.token_ids:
        assert len(set(texts)) > 1, "a text that proves nothing"
