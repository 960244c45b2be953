"""Models that loop their own layers: as many rows as visits, and gradients of all of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kit.models import load_folder, write_tiny_backbone
from recmas_compiler.backbones.torch_model import TorchBackbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an HRM of one layer a stack: two cycles of three low passes and a high one."""
    folder = write_tiny_backbone(tmp_path_factory.mktemp("looped") / "hrm", "llama")
    tiny = json.loads((folder / "config.json").read_text())
    config = AutoConfig.for_model(
        "hrm_text",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=8,
        vocab_size=tiny["vocab_size"],
        eos_token_id=tiny["eos_token_id"],
        initializer_range=0.1,
        embedding_scale=1.0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> TorchBackbone:
    return load_folder(folder)


def test_older_files_count_the_layers_of_a_stack(folder: Path, backbone: TorchBackbone) -> None:
    assert backbone.facts.num_layers == 8
    config = json.loads((folder / "config.json").read_text())
    older = copy.deepcopy(config)
    older["num_hidden_layers"] = older.pop("num_layers_per_stack")
    (folder / "config.json").write_text(json.dumps(older))
    try:
        assert load_folder(folder).facts.num_layers == 8
    finally:
        (folder / "config.json").write_text(json.dumps(config))


def test_gradients_are_of_all_passes(backbone: TorchBackbone) -> None:
    """Held against differences of the output itself."""
    model = copy.deepcopy(backbone.model).double()
    embeds = 0.3 * torch.randn(1, 5, 32, dtype=torch.float64)
    direction = torch.randn_like(embeds)

    def chance(embeds: Tensor) -> Tensor:
        logits: Tensor = model(inputs_embeds=embeds, use_cache=False).logits
        return logits[0, -1].log_softmax(-1)[7]

    (gradient,) = torch.autograd.grad(chance(embeds.requires_grad_()), embeds)
    with torch.no_grad():
        step = 3e-4 * direction
        slope = (chance(embeds + step) - chance(embeds - step)) / (2 * 3e-4)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-2)
