"""Experts of a mixture in the operators of a CPU, and where those do not have what a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import AutoConfig, AutoModelForCausalLM

from kit.engines import Exported, random_ids, relative
from kit.models import load_folder
from kit.parser_documentation import refused_nodes
from kit.zoo import write_zoo_model
from recmas_compiler.backbones.facts import weights_bytes
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export.backbone_graph import CPU_DECODER, DECODER, WEIGHTS, export_backbone
from recmas_export.passes.experts import StoreExperts, UseMixtureOperator
from recmas_export.pipeline import run_passes
from recmas_runtime.engines.tensorrt.static_graph import read_graph, static_decoder
from recmas_runtime.formats.precisions import PRECISIONS, TOLERANCES

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
        pytest.param(
            {"hidden_act": "gelu"}, {"MoE": 0, "Scan": 2, "If": 0}, marks=pytest.mark.families
        ),
        # more than half of the experts for one position
        pytest.param(
            {"num_experts_per_tok": 5},
            {"MoE": 2, "Scan": 0, "If": 0},
            marks=pytest.mark.families,
        ),
    ],
)
def test_both_decoders_are_right(
    changes: dict[str, Any], expected: dict[str, int], tmp_path: Path
) -> None:
    backbone = mixture(tmp_path / "model", **changes)
    export_backbone(backbone, tmp_path)
    found = operators(tmp_path / CPU_DECODER)
    assert {name: found[name] for name in expected} == expected
    found = operators(tmp_path / DECODER)
    assert [found[name] for name in ("MoE", "Scan", "If")] == [0, 2, 2]
    expected_size = weights_bytes(backbone.facts, precision="float32")
    assert (tmp_path / WEIGHTS).stat().st_size == pytest.approx(expected_size, rel=0.05)
    case = Exported(backbone, tmp_path, was_changed=False)
    ids = random_ids(backbone, 1, 20)
    for_tensorrt = static_decoder(read_graph(tmp_path / DECODER), 64, file=DECODER)
    assert refused_nodes(onnx.shape_inference.infer_shapes(for_tensorrt)) == []
    adapted = "adapted.onnx"
    for node in for_tensorrt.graph.node:
        if node.op_type == "Attention":
            # ONNX Runtime refuses what only TensorRT's parser knows.
            node.attribute.remove(next(a for a in node.attribute if a.name == "TRT_decomposable"))
    onnx.save(for_tensorrt, tmp_path / adapted)
    for file in (DECODER, CPU_DECODER, adapted):
        assert relative(hidden_of(case, tmp_path, file, ids), case.reference(ids)) < TIGHT, file


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("qwen3_moe", "int4"),
        *(
            pytest.param(*each, marks=pytest.mark.families)
            for each in (("qwen3_moe", "int8"), ("gpt_oss", "int8"), ("gpt_oss", "int4"))
        ),
    ],
)
def test_blocks_of_experts_are_stored_once(name: str, precision: str, tmp_path: Path) -> None:
    """The CPU's operator, the lookup of a step and the Scan of a prompt read the same bytes."""
    backbone = mixture(tmp_path / "model", name)
    export_backbone(backbone, tmp_path, precision=precision)
    assert operators(tmp_path / CPU_DECODER)["QMoE"] == 2
    found = operators(tmp_path / DECODER)
    assert [found[each] for each in ("If", "Scan", "GatherBlockQuantized")] == [2, 2, 4]
    facts = backbone.facts
    expected = weights_bytes(facts, precision=precision)
    assert (tmp_path / WEIGHTS).stat().st_size == pytest.approx(expected, rel=0.25)
    case = Exported(backbone, tmp_path, was_changed=False)
    ids = random_ids(backbone, 1, 20)
    expected_hidden = case.reference(ids)
    for file in (DECODER, CPU_DECODER):
        stepped = hidden_of(case, tmp_path, file, ids)
        assert (
            relative(stepped, expected_hidden) < PRECISIONS[precision].tolerances["hidden_relative"]
        ), file
        # of most positions: in one, rounding may choose another expert
        errors = np.abs(stepped - expected_hidden).max(-1) / np.abs(expected_hidden).max()
        assert np.median(errors) < {"int8": 0.02, "int4": 0.3}[precision], file
        whole = case.call(case.new_cache(1), case.embed(ids), write_index=[0])["hidden"]
        # activations are rounded to 8 bits in blocks of each position: equal, if not to the digit
        assert relative(stepped[:, -1], whole[:, -1]) < 1e-2, file


@pytest.mark.families
def test_experts_that_are_no_whole_blocks_stay_as_they_are(tmp_path: Path) -> None:
    backbone = mixture(tmp_path / "model", moe_intermediate_size=24)
    export_backbone(backbone, tmp_path, precision="int4")
    assert operators(tmp_path / CPU_DECODER)["MoE"] == 2
    assert operators(tmp_path / DECODER)["GatherBlockQuantized"] == 0
    assert (tmp_path / WEIGHTS).stat().st_size > 4 * backbone.facts.num_expert_parameters


@pytest.mark.families
@pytest.mark.parametrize(("name", "layers"), [("qwen3_moe", 2), ("glm4_moe", 1)])
def test_what_chooses_experts_stays_exact(name: str, layers: int, tmp_path: Path) -> None:
    backbone = mixture(tmp_path / "model", name)
    export_backbone(backbone, tmp_path, precision="int4")
    for file in (DECODER, CPU_DECODER):
        graph = onnx.load(tmp_path / file, load_external_data=False).graph
        routers = [
            tensor
            for tensor in graph.initializer
            if "gate.weight" in tensor.name and tensor.data_type == onnx.TensorProto.FLOAT
        ]
        assert len(routers) == layers, file


def test_shares_of_any_router() -> None:
    """The operator's own router gives them back: in any sum, with zeros, twice the same expert."""
    shares = np.array([[0.5, 0.25], [3, 1], [1, 0], [0.5, 0.5], [0, 0], [-1, 2]], np.float32)
    taken = np.array([[0, 2], [2, 1], [1, 0], [1, 1], [0, 1], [0, 1]])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(shares), 4)).astype(np.float32)
    first, last = (rng.standard_normal(size).astype(np.float32) for size in ((3, 4, 4), (3, 4, 4)))
    text = """
        <ir_version: 10, opset_import: ["": 24, "recmas": 1]>
        g (float[n,4] x, int64[n,2] taken, float[n,2] shares) => (float[n,4] y) {
            a = recmas.ExpertsIn (x, taken, first)
            b = Identity (a)
            c = recmas.ExpertsOut (b, taken, last)
            y = recmas.ExpertsSum (c, taken, shares)
        }"""
    proto = onnx.parser.parse_model(text)
    for name, array in (("first", first), ("last", last)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    for value in (node.outputs[0] for node in model.graph):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["p", 4])
    run_passes((StoreExperts(), UseMixtureOperator(), RemoveUnusedNodesPass()), model)
    assert [node.op_type for node in model.graph].count("MoE") == 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": x, "taken": taken, "shares": shares})
    products = np.einsum("nkdw,nkwi,ni->nkd", last[taken], first[taken], x)
    expected = (products * shares[..., None]).sum(1)
    np.testing.assert_allclose(found[:-1], expected[:-1], rtol=1e-5, atol=1e-5)
    assert np.isnan(found[-1]).all(), "a share below zero has no logarithm"
