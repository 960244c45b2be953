"""Loading backbones: quietly, completely, or with an error that names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from kit.models import COMMON_DIMS, FAMILIES, LoadTiny, load_folder, write_tiny_backbone
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone, weights_digest
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Silent


def facts_of(folder: Path, **changes: Any) -> BackboneFacts:
    """Return facts good enough to try loading a folder that the front end would refuse."""
    values: dict[str, Any] = {
        "source": str(folder),
        "identity": str(folder),
        "model_type": "llama",
        "width": 64,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 282,
        "max_positions": 1024,
        "attention": ("full",) * 3,
        "sliding_window": None,
        "num_parameters": 1,
    }
    return BackboneFacts(**{**values, **changes})


def refusal(folder: Path) -> tuple[str, str]:
    """Return code and text of the error that loading raises."""
    with pytest.raises(RecmasError) as caught:
        load_backbone(facts_of(folder), progress=Silent())
    assert str(folder) in str(caught.value)
    return caught.value.problems[0].code, str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_written(tiny: LoadTiny, family: str) -> None:
    backbone = tiny(family)
    kind = FAMILIES[family]
    assert backbone.chat_template.strip() == kind.template.strip()
    assert backbone.bos_token == kind.bos
    tokens = {backbone.tokenizer.convert_ids_to_tokens(i) for i in backbone.eos_token_ids}
    assert tokens == {*kind.stops, kind.eos}
    assert backbone.special_tokens["eos_token"] == kind.eos
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert all(p.dtype == torch.float32 for p in backbone.model.parameters())
    num_parameters = sum(p.numel() for p in backbone.model.parameters())
    # the facts count matrices, and leave out what some families have of small vectors
    assert num_parameters == pytest.approx(backbone.facts.num_parameters, rel=0.01)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = backbone.body(inputs_embeds=backbone.embed(ids)).last_hidden_state
    assert hidden.shape == (1, 4, backbone.facts.width)
    torch.testing.assert_close(
        backbone.logits(hidden), backbone.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_loading_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_folder(write_tiny_backbone(tmp_path, "llama"))
    assert capfd.readouterr() == ("", "")


def test_equal_weights_have_equal_digests(tiny: LoadTiny, tmp_path: Path) -> None:
    digest = weights_digest(tiny("qwen3").model)
    assert digest == weights_digest(load_folder(write_tiny_backbone(tmp_path, "qwen3")).model)
    assert digest != weights_digest(tiny("qwen3", seed=1).model)
    assert len(digest) == 64


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "quantized (gptq)" in text


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "lacks 1 weights, such as 'model.layers.1.mlp.up_proj.weight'" in text


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert refusal(tmp_path)[0] == "RM200"


def test_cut_weights_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(tmp_path)[0] in {"RM200", "RM202"}


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", intermediate_size=128)
    assert refusal(tmp_path)[0] == "RM202"


def test_a_model_that_is_not_causal_is_refused(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "not a causal language model (BertForMaskedLM)" in text


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "config.json", model_type="from_the_future", architectures=None)
    assert refusal(tmp_path)[0] == "RM202"


def test_code_in_the_repository_is_not_run(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    edit(
        tmp_path / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    assert refusal(tmp_path)[0] == "RM202"


def test_a_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").unlink()
    code, text = refusal(tmp_path)
    assert code == "RM206"
    assert "no chat template" in text


def test_a_head_that_does_something_unknown_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_backbone(tmp_path, "llama")
    usual = TorchBackbone.logits
    # the model scales its logits, as some families do, and our head does not know
    monkeypatch.setattr(TorchBackbone, "logits", lambda self, h: usual(self, h) * 8)
    code, text = refusal(tmp_path)
    assert code == "RM202"
    assert "in a way recmas does not know" in text


def test_end_tokens_outside_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "llama")
    edit(tmp_path / "generation_config.json", eos_token_id=[-1, 3, 9_999_999])
    backbone = load_folder(tmp_path)
    assert backbone.eos_token_ids == (3, backbone.tokenizer.eos_token_id)


def test_only_the_text_model_of_a_seeing_model_is_used(tmp_path: Path) -> None:
    write_tiny_backbone(tmp_path, "gemma3")
    text = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    seeing = Gemma3ForConditionalGeneration(config)
    seeing.model.language_model.load_state_dict(text.model.state_dict())
    seeing.save_pretrained(tmp_path)
    backbone = load_backbone(
        facts_of(tmp_path, vocab_size=text.config.vocab_size), progress=Silent()
    )
    assert sum(p.numel() for p in backbone.model.parameters()) == text.num_parameters()
    ids = torch.tensor([[9, 8, 7, 6, 5, 4, 3, 2, 12, 13, 14]])
    torch.testing.assert_close(backbone.model(input_ids=ids).logits, text(input_ids=ids).logits)


def test_a_padded_vocabulary_loads(tmp_path: Path) -> None:
    backbone = load_folder(write_tiny_backbone(tmp_path, "qwen2", vocab_size=320))
    assert backbone.facts.vocab_size == 320
    assert len(backbone.tokenizer) < 320
    assert set(COMMON_DIMS) <= backbone.model.config.to_dict().keys()
