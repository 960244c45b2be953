"""Backbones whose weights are stored in half the bytes: same numbers, same answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from kit.bundles import BuildTiny, num_weight_bytes
from kit.models import write_tiny_backbone
from kit.specs import on_three_backbones
from recmas_compiler.backbones.sources import describe_backbone
from recmas_compiler.backbones.torch_model import load_backbone
from recmas_export.backbone_graph import DECODER, EMBED, HEAD, WEIGHTS, export_backbone
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.safetensors_file import read_tensors

RECORDS: list[dict[str, object]] = [
    {"id": "1", "question": "What is 7 * 8?"},
    {"id": "2", "question": "Anna has three plans. Which is the best one, and why?"},
]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float16"),
        pytest.param("gemma3", "bfloat16", marks=pytest.mark.families),
        pytest.param("llama", "bfloat16", marks=pytest.mark.families),
        pytest.param("gemma3", "float16", marks=pytest.mark.families),
    ],
)
def test_half_the_bytes(family: str, dtype: str, tmp_path: Path) -> None:
    folder = write_tiny_backbone(tmp_path / "model", family)
    facts = describe_backbone(str(folder), base_dir=tmp_path)
    sizes, loaded = {}, {}
    for name in ("float32", dtype):
        loaded[name] = load_backbone(facts, progress=Silent(), dtype=name)
        export_backbone(loaded[name], tmp_path / name)
        sizes[name] = num_weight_bytes(tmp_path / name / WEIGHTS)
    # the tiny norms and the table of rotations stay float32 where they have to
    assert 0.5 <= sizes[dtype] / sizes["float32"] < 0.55
    stored, _ = read_tensors(tmp_path / dtype / WEIGHTS)
    table = loaded[dtype].embedding.weight
    (found,) = [a for a in stored.values() if a.shape == tuple(table.shape)][:1]
    assert np.array_equal(np.asarray(found, np.float32), table.detach().numpy())
    assert torch.equal(table, table.to(getattr(torch, dtype)).float())
    assert not torch.equal(table, loaded["float32"].embedding.weight)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    folder = write_tiny_backbone(tmp_path / "model", "gemma3")
    facts = describe_backbone(str(folder), base_dir=tmp_path)
    backbone = load_backbone(facts, progress=Silent(), dtype="bfloat16")
    export_backbone(backbone, tmp_path / "out")
    places = []
    for name in (EMBED, HEAD):
        graph = onnx.load(tmp_path / "out" / name, load_external_data=False).graph
        large = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        (table,) = [t for t in large if t.dims[0] == facts.vocab_size]
        assert table.data_type == onnx.TensorProto.BFLOAT16
        places.append({entry.key: entry.value for entry in table.external_data})
    assert places[0] == places[1]
    embed = onnx.load(tmp_path / "out" / EMBED, load_external_data=False).graph
    kinds = [node.op_type for node in embed.node]
    assert kinds.index("Gather") < kinds.index("Cast"), "the whole table would be copied"
    decoder = onnx.load(tmp_path / "out" / DECODER, load_external_data=False).graph
    assert {t.data_type for t in decoder.initializer} >= {onnx.TensorProto.BFLOAT16}


def test_weights_beyond_float16(tmp_path: Path) -> None:
    folder = write_tiny_backbone(tmp_path / "model", "llama")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    facts = describe_backbone(str(folder), base_dir=tmp_path)
    with pytest.raises(RecmasError, match=r"RM202.*float16 cannot hold.*up_proj"):
        load_backbone(facts, progress=Silent(), dtype="float16")
    load_backbone(facts, progress=Silent(), dtype="bfloat16")


MIXED = on_three_backbones(
    "source: llama, dtype: bfloat16", "source: qwen3, dtype: float16", "source: gemma3"
)


def test_several_element_types_in_one_system(build_tiny: BuildTiny) -> None:
    """Messages are float32, so backbones of any element type understand each other."""
    built = build_tiny(MIXED)
    answers = built.system.run(RECORDS)
    expected = built.reference(RECORDS)
    assert [answer.answer for answer in answers] == list(expected.texts)
    assert expected.texts == built.naive(RECORDS).texts
    sizes = {
        name: (built.bundle / entry.weights).stat().st_size
        for name, entry in built.system.manifest.backbones.items()
    }
    plain = build_tiny(MIXED.replace(", dtype: bfloat16", "").replace(", dtype: float16", ""))
    for name, entry in plain.system.manifest.backbones.items():
        share = sizes[name] / (plain.bundle / entry.weights).stat().st_size
        assert share == 1 if name == "third" else share < 0.6, name


def test_one_model_in_two_element_types_is_two_backbones(build_tiny: BuildTiny) -> None:
    text = MIXED.replace("source: qwen3, dtype: float16", "source: llama, dtype: float32")
    assert set(build_tiny(text).system.manifest.backbones) == {"small", "other", "third"}
    text = MIXED.replace("source: qwen3, dtype: float16", "source: llama, dtype: bfloat16")
    assert set(build_tiny(text).system.manifest.backbones) == {"small", "third"}
