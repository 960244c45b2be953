"""Layers that are copied in a graph, in place of traced one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.models import load_folder, load_tiny
from kit.zoo import write_zoo_model
from recmas_compiler.backbones.loaded.own_head import body_of
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export import export_torch
from recmas_export.export_torch import trace_body
from recmas_export.trace.repeat import find_repetition, output_digests

ROUNDS = 4  # of two layers that rows of the zoo have: every kind comes at least three times


def traced_layers(backbone: TorchBackbone, masked: Sequence[Sequence[int]] = ()) -> int | None:
    facts = backbone.facts
    groups = {layer: number for number, group in enumerate(masked) for layer in group}
    kinds = [(kind, groups.get(layer)) for layer, kind in enumerate(facts.attention)]
    found = find_repetition(body_of(backbone.model), facts.layers, kinds)
    return None if found is None else found.traced


def graphs_of(
    backbone: TorchBackbone, monkeypatch: pytest.MonkeyPatch, masked: Sequence[Sequence[int]] = ()
) -> tuple[Any, Any]:
    """Return the graph with copied layers and that of which each was traced."""
    copied = trace_body(backbone.model, backbone.facts, masked)
    with monkeypatch.context() as patch:
        patch.setattr(export_torch, "find_repetition", lambda *_: None)
        whole = trace_body(backbone.model, backbone.facts, masked)
    return copied.graph, whole.graph


def check_equal(copied: Any, whole: Any) -> None:
    assert output_digests(copied) == output_digests(whole)
    assert [value.name for value in copied.inputs] == [value.name for value in whole.inputs]
    assert copied.initializers.keys() == whole.initializers.keys()
    for name, weight in whole.initializers.items():
        assert np.array_equal(copied.initializers[name].const_value, weight.const_value)


def test_copied_layers_compute_what_traced_ones_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows are hidden from some of them."""
    backbone = load_tiny(tmp_path, "llama", num_hidden_layers=6)
    masked = ((1, 2, 5),)
    assert traced_layers(backbone, masked) == 5
    check_equal(*graphs_of(backbone, monkeypatch, masked))


@pytest.mark.families
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text", "afmoe", "helium", "gpt2", "gptj"])
def test_layers_of_many_kinds_are_copied(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_folder(write_zoo_model(tmp_path, name, rounds=ROUNDS))
    found = traced_layers(backbone)
    assert found is not None
    assert found < backbone.facts.num_layers
    copied, whole = graphs_of(backbone, monkeypatch)
    assert any(node.name.endswith("_layer_7") for node in copied)
    check_equal(copied, whole)


@pytest.mark.families
def test_a_layer_that_differs_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a number of its own, or in what the model does between layers."""
    backbone = load_tiny(tmp_path, "llama", num_hidden_layers=5)
    assert traced_layers(backbone) == 3
    body: Any = body_of(backbone.model)
    body.layers[4].input_layernorm.variance_epsilon = 0.5
    assert traced_layers(backbone) is None
    body.layers[4].input_layernorm.variance_epsilon = body.layers[
        3
    ].input_layernorm.variance_epsilon
    assert traced_layers(backbone) == 3

    def scaled(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output * (2.0 + module.self_attn.layer_idx)

    for layer in body.layers:  # one and the same hook, whose result depends on the layer
        layer.register_forward_hook(scaled)
    assert traced_layers(backbone) == 3
    copied, whole = graphs_of(backbone, monkeypatch)
    assert not any("_layer_" in node.name for node in copied)
    check_equal(copied, whole)
