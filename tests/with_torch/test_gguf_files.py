"""GGUF files as backbones: the same model as the folder that they were written from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from kit.gguf_models import ARCHITECTURES, llama3_divisors, write_gguf
from kit.models import load_folder, write_tiny_backbone
from kit.zoo import ZOO, write_zoo_model
from recmas_compiler.backbones.gguf_files import architectures
from recmas_compiler.backbones.gguf_files.header import TENSOR_TYPES
from recmas_compiler.backbones.sources import describe_backbone
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent

# Gemma's layers slide in llama.cpp's code with a period of their own; a scale is never written.
_GEMMA2 = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24}
_GEMMA3 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, Mapping[str, Any]] = {
    "llama": {"head_dim": 24},
    "llama yarn": {},
    "llama 3": {"head_dim": 64, "rope_parameters": _LLAMA3, "max_position_embeddings": 16384},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {"norm_topk_prob": True},
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}


def load(path: Path) -> TorchBackbone:
    facts = describe_backbone(f"gguf:{path.name}", base_dir=path.parent)
    return load_backbone(facts, progress=Silent())


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_is_the_model_that_it_was_made_of(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ZOO, name, {**ZOO.get(name, {}), **MODELS[name]})
    folder = write_zoo_model(tmp_path / "folder", name)
    divisors = llama3_divisors(_LLAMA3, _LLAMA3["rope_theta"], 64)
    more = {"rope_freqs.weight": divisors} if name == "llama 3" else None
    expected = load_folder(folder)
    found = load(write_gguf(folder, tmp_path / "model.gguf", more=more))
    theirs, ours = expected.model.state_dict(), found.model.state_dict()
    assert theirs.keys() == ours.keys()
    for weight, value in theirs.items():
        # norms that are stored plus one lose their last bits
        assert torch.allclose(ours[weight], value, rtol=0, atol=2e-7), weight
    ids = torch.arange(3, 40)[None] % expected.facts.vocab_size
    with torch.no_grad():
        logits = expected.model(ids).logits
        assert torch.allclose(found.model(ids).logits, logits, rtol=0, atol=1e-4)
    same = ("model_type", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    same += ("vocab_size", "max_positions", "attention", "num_parameters", "num_tables")
    for fact in same:
        assert getattr(found.facts, fact) == getattr(expected.facts, fact), fact
    text = "the plan and 12 then\n\nering"
    assert found.tokenizer(text).input_ids == expected.tokenizer(text).input_ids
    assert (found.chat_template, found.eos_token_ids) == (
        expected.chat_template,
        expected.eos_token_ids,
    )


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.BF16])
def test_quantized_blocks_mean_what_llama_cpp_says(kind: Type, tmp_path: Path) -> None:
    folder = write_tiny_backbone(tmp_path / "folder", "qwen3", num_hidden_layers=1)
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = load(write_gguf(folder, tmp_path / "model.gguf", quantized=kind)).model.state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    stored = gguf.quants.quantize(whole[name].numpy(), kind)
    assert np.array_equal(found[name].numpy(), gguf.quants.dequantize(stored, kind))
    assert not torch.equal(found[name], whole[name])
    assert torch.equal(found["model.norm.weight"], whole["model.norm.weight"])


def test_types_of_tensors_are_those_of_llama_cpp() -> None:
    for number, kind in TENSOR_TYPES.items():
        named = Type(number)
        size = gguf.GGML_QUANT_SIZES[named]
        assert (kind.name, kind.block_size, kind.block_bytes) == (named.name, *size)
    widened = {"F32", "F16", *(kind.name for kind in gguf.quants._type_traits)}
    assert {kind.name for kind in TENSOR_TYPES.values()} <= widened


def test_every_architecture_is_shown() -> None:
    shown = {ARCHITECTURES[name.partition(" ")[0]] for name in MODELS}
    assert shown == set(architectures.ARCHITECTURES)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_backbone(tmp_path / "folder", "llama")
    path = write_gguf(folder, tmp_path / "model.gguf")
    raw = bytearray(path.read_bytes())
    raw[-64:] = np.full(16, np.nan, dtype=np.float32).tobytes()
    path.write_bytes(raw)
    with pytest.raises(RecmasError, match=r"RM202.*NaN or infinite"):
        load(path)
