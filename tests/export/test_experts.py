"""Experts of a mixture in the operators of a CPU, and where those do not have what a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from kit.engines import Exported, random_ids, relative
from kit.models import load_folder
from kit.zoo import write_zoo_model
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export.backbone_graph import CPU_DECODER, DECODER, export_backbone
from recmas_runtime.formats.precisions import TOLERANCES

TIGHT = TOLERANCES["hidden_relative"] / 10


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


def operators(path: Path) -> Counter[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in all_nodes(graph))


def mixture(folder: Path, name: str = "qwen3_moe", **changes: Any) -> TorchBackbone:
    """Return a tiny model of the zoo with entries of its config changed."""
    write_zoo_model(folder, name)
    if changes:
        config = AutoConfig.from_pretrained(folder, **changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.copy_(torch.randn(weight.shape) * 0.7 / weight.shape[-1] ** 0.5)
        model.save_pretrained(folder)
    return load_folder(folder)


def hidden_of(case: Exported, folder: Path, file: str, ids: torch.Tensor) -> NDArray[np.float32]:
    """Return what a decoder gives for a prompt and then one position more."""
    case.decoder = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
    embeds, cache = case.embed(ids), case.new_cache(1)
    prompt = case.call(cache, embeds[:, :-1], write_index=[0])
    step = case.call(cache, embeds[:, -1:], write_index=[ids.shape[1] - 1])
    return np.concatenate([prompt["hidden"], step["hidden"]], axis=1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"MoE": 2, "Scan": 0, "If": 0}),
        # a gate that the operator does not have
        ({"hidden_act": "gelu"}, {"MoE": 0, "Scan": 2, "If": 0}),
        # so many experts that no position looks half of them up
        ({"num_experts_per_tok": 5}, {"MoE": 2, "Scan": 0, "If": 0}),
    ],
)
def test_both_decoders_are_right(
    changes: dict[str, Any], expected: dict[str, int], tmp_path: Path
) -> None:
    backbone = mixture(tmp_path / "model", **changes)
    export_backbone(backbone, tmp_path)
    found = operators(tmp_path / CPU_DECODER)
    assert {name: found[name] for name in expected} == expected
    branches = 0 if "num_experts_per_tok" in changes else 2
    found = operators(tmp_path / DECODER)
    assert {name: found[name] for name in ("MoE", "Scan", "If")} == {
        "MoE": 0,
        "Scan": 2,
        "If": branches,
    }
    case = Exported(backbone, tmp_path, was_changed=False)
    ids = random_ids(backbone, 1, 20)
    for file in (DECODER, CPU_DECODER):
        assert relative(hidden_of(case, tmp_path, file, ids), case.reference(ids)) < TIGHT, file
