"""Rows in pieces and packed products: the same losses and gradients, and fewer bytes for them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kit.models import LoadTiny
from kit.systems import declare, random_links
from kit.training import TOPOLOGIES, examples, on_one, training_graph
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.lowering.training_graph.packed_products import pack_products
from training_tolerances import TOLERANCES


def copied(backbone: TorchBackbone) -> TorchBackbone:
    return replace(backbone, model=copy.deepcopy(backbone.model))


def in_one_piece(graph: TrainingGraph) -> TrainingGraph:
    """Have a graph's calls concatenate their rows in every step."""
    for calls in graph._agent_calls.values():
        assert calls._in_pieces
        calls._in_pieces = False
    return graph


def learned(graph: TrainingGraph) -> tuple[float, dict[str, Tensor]]:
    graph.zero_grad()
    loss = graph(graph.prepare(examples(graph))).mean
    loss.backward()
    found = {name: p.grad for name, p in graph.links.named_parameters() if p.grad is not None}
    return loss.item(), found


def assert_same(one: TrainingGraph, other: TrainingGraph) -> None:
    (loss, gradients), (other_loss, others) = learned(one), learned(other)
    assert other_loss == pytest.approx(loss, rel=TOLERANCES["loss_relative"])
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        error = (others[name] - gradient).abs().max()
        assert error <= TOLERANCES["gradient_relative"] * gradient.abs().max(), name


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.families)])
@pytest.mark.parametrize("name", ["self_loop", pytest.param("mixture", marks=pytest.mark.heavy)])
def test_pieces_learn_what_one_cache_does(tiny: LoadTiny, name: str, family: str) -> None:
    backbone = tiny(family)
    topology = on_one(name, backbone)
    links = random_links(topology)
    graphs = [training_graph(topology, {"tiny": backbone}, links, mode="rollout") for _ in range(2)]
    assert_same(graphs[0], in_one_piece(graphs[1]))


def test_steps_do_not_keep_copies_of_the_prompt(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    topology = TOPOLOGIES["sequential"](steps=12, backbones=[declare("tiny", backbone)])
    record = TrainExample(
        id="0",
        index=0,
        fields={"question": "Why? " * 30},
        targets=dict.fromkeys(topology.system.agents, "So."),
    )
    kept = []
    for is_whole in (False, True):
        graph = training_graph(topology, {"tiny": backbone}, mode="rollout")
        if is_whole:
            in_one_piece(graph)
        storages: dict[int, int] = {}

        def note(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = graph(graph.prepare([record])).mean
        kept.append(sum(storages.values()))
        del loss
    assert kept[0] < kept[1] / 2


def test_later_rounds_do_not_read_the_first_ones_text_again(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    topology = on_one("self_loop", backbone)
    graph = training_graph(topology, {"tiny": backbone}, mode="rollout")
    batch = graph.prepare(examples(topology))
    read: list[int] = []

    def note(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        embeds = kwargs["inputs_embeds"]
        if len(embeds) > 1 and embeds.shape[1] > 1 and not embeds.requires_grad:
            read.append(embeds.shape[1])

    handle = backbone.body.register_forward_pre_hook(note, with_kwargs=True)
    graph(batch)
    whole = list(read)
    read.clear()
    in_one_piece(graph)(batch)
    handle.remove()
    # What is told in round 1 is read once, and so is the rest of later prompts.
    assert sum(whole) < sum(read) - 60


def test_attention_that_is_no_interface_gets_its_rows_in_one(tiny: LoadTiny) -> None:
    backbone = copied(tiny("llama"))
    backbone.model.set_attn_implementation("eager")
    topology = on_one("self_loop", backbone)
    graph = training_graph(topology, {"tiny": backbone}, mode="rollout")
    assert not any(calls._in_pieces for calls in graph._agent_calls.values())


def linear_layers(backbone: TorchBackbone) -> list[nn.Linear]:
    return [module for module in backbone.body.modules() if type(module) is nn.Linear]


def test_packed_weights_learn_what_plain_ones_do(tiny: LoadTiny) -> None:
    backbone = tiny("llama")
    packed = copied(backbone)
    topology = on_one("self_loop", backbone)
    links = random_links(topology)
    plain = training_graph(topology, {"tiny": backbone}, links, mode="rollout")
    graph = training_graph(topology, {"tiny": packed}, links, mode="rollout", pack_weights=True)
    assert_same(plain, graph)
    assert all(layer.weight.numel() == 0 for layer in linear_layers(packed))
    assert all(layer.weight.numel() > 0 for layer in linear_layers(backbone))


def test_bfloat16_products_are_packed(tiny: LoadTiny) -> None:
    backbone = copied(tiny("llama"))
    backbone.model.to(torch.bfloat16)
    layer = linear_layers(backbone)[0]
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.float().sum(), x)
    assert pack_products(backbone)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    (own,) = torch.autograd.grad(found.float().sum(), x)
    torch.testing.assert_close(own, gradient, rtol=2e-2, atol=2e-2)


def test_a_model_that_reads_its_weights_keeps_them(tiny: LoadTiny) -> None:
    backbone = copied(tiny("llama"))
    layer = linear_layers(backbone)[0]
    weight = layer.weight
    backbone.body.register_forward_pre_hook(lambda *_: layer.weight[0, 0] and None)
    assert not pack_products(backbone)
    assert layer.weight is weight
    assert "forward" not in vars(layer)
