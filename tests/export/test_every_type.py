"""`check` tells of every causal model type of transformers what a build would find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kit.measured import largest_difference
from kit.random_weights import random_model
from kit.small_configs import small_config
from kit.zoo import SEEING, ZOO
from recmas_compiler.backbones.config.unsupported import NOT_TRACED
from recmas_compiler.backbones.facts import BackboneFacts, read_config_facts
from recmas_compiler.backbones.loaded.own_layers import layers_of
from recmas_compiler.backbones.loaded.text_model import text_model
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.precisions import TOLERANCES

TIGHT = TOLERANCES["hidden_relative"] / 10

RUN = {name.partition(" ")[0] for name in (*ZOO, *SEEING)}
# The class of the one more refuses what it fills in itself.
OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - RUN - {"gemma4_assistant"})
# Their parts have configs and sizes of their own: they are refused as they are.
NESTED = {
    *("blt", "dots3_note", "emu3", "gemma3n", "gemma4", "mllama", "musicgen"),
    *("gemma4_unified_assistant", "musicgen_melody", "qwen4_exp"),
}
# Whole families are refused, whatever of them would run: they are not made to continue a text.
NOT_MADE_FOR_IT = ("encoder", "not a causal language model")
# A quarter of a gigabyte: what a type keeps in an entry that no table names would fill the memory.
MOST_PARAMETERS = 1 << 26


def told_by_check(config: Any, model_type: str, folder: Path) -> str | None:
    """Return why `check` refuses a config as its class writes it, None if it does not."""
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.save_pretrained(folder)
    try:
        read_config_facts(folder, source=model_type, identity=model_type)
    except RecmasError as error:
        return str(error)
    return None


@torch.no_grad()
def found_by_a_build(config: Any, folder: Path) -> str | None:
    """Return why a model with random weights cannot be built, None if its engines are right."""
    try:
        figure = largest_difference(_backbone(config), folder)
    except Exception as error:  # whatever the model's code raises
        return f"{type(error).__name__}: {error}"
    return None if figure < TIGHT else f"{figure:.0e} apart from transformers"


def _backbone(config: Any) -> TorchBackbone:
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).parameters()
        found = sum(weight.numel() for weight in shapes)
    if found > MOST_PARAMETERS:
        pytest.fail(f"{found} parameters: say in `kit.small_configs` what makes it small")
    model = random_model(AutoModelForCausalLM, config).requires_grad_(False)
    model = text_model(model).eval()
    layers = layers_of(model)
    facts = BackboneFacts(
        source="small",
        identity="small",
        model_type=config.model_type,
        width=model.get_input_embeddings().weight.shape[1],
        num_layers=len(layers),
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        vocab_size=300,
        max_positions=256,
        layers=layers,
        attention=("full",) * len(layers),
        sliding_window=None,
        num_parameters=1,
    )
    return TorchBackbone(
        facts=facts,
        dtype="float32",
        model=model,
        tokenizer=None,  # type: ignore[arg-type]  # nothing is tokenized
        tokenizer_json="{}",
        chat_template="",
        special_tokens={},
        bos_token=None,
        eos_token_ids=(),
    )


def test_what_is_written_down_by_hand_is_held_against_a_build() -> None:
    """The test below builds what `check` refuses, but for parts and for whole families."""
    assert set(OTHERS) - NESTED >= set(NOT_TRACED)
    for reason in NOT_TRACED.values():
        assert not any(words in reason for words in NOT_MADE_FOR_IT)


@pytest.mark.families
@pytest.mark.parametrize("model_type", OTHERS)
def test_what_check_says_is_what_a_build_finds(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type]() if model_type in NESTED else small_config(model_type)
    told = told_by_check(config, model_type, tmp_path / "model")
    if model_type in NESTED or (told and any(reason in told for reason in NOT_MADE_FOR_IT)):
        assert told is not None
        return
    found = found_by_a_build(config, tmp_path / "graphs")
    assert (told is None) == (found is None), f"check says {told!r}, and a build {found!r}"
