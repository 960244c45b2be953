"""Parameters counted from a config are those of the model that transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kit.zoo import FAST, SEEING, ZOO, write_zoo_config, zoo_config
from recmas_compiler.backbones.facts import BackboneFacts, read_config_facts
from recmas_compiler.backbones.loaded.text_model import text_model

# Biases, and norms of heads and ranks, are not counted: of models as narrow as these a hundredth.
NARROW = 0.02
# The same at the sizes that a type's class fills in, mostly those of a released model.
RELEASED = 0.01

# What only sees or hears is a part of its own, also where it is inside the text model.
OTHER_SENSES = "embed_tokens_extend"


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.families)
        for name in (*ZOO, *SEEING)
    ],
)
def test_parameters_of_a_small_model(name: str, tmp_path: Path) -> None:
    loader, config = zoo_config(name)
    with torch.device("meta"):
        model = loader.from_config(config)
    facts = told(tmp_path, name, config, model)
    assert facts.num_parameters == pytest.approx(counted(model), rel=NARROW)
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert facts.num_tables == (1 if is_tied else 2)


# Of what their classes fill in they make no model, or one that is refused.
WITHOUT_DEFAULTS = {"bloom", "cohere_compass_text", "dots1", "gemma4_text", "hunyuan_v1_dense"}
WITHOUT_DEFAULTS |= {"hunyuan_v1_moe", "lfm2_moe", "ministral", "nemotron"}


@pytest.mark.families
@pytest.mark.parametrize(
    "name", sorted({name for name in ZOO if " " not in name} - WITHOUT_DEFAULTS)
)
def test_parameters_at_the_sizes_of_a_class(name: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    facts = told(tmp_path, name, config, model)
    assert facts.num_parameters == pytest.approx(counted(model), rel=RELEASED)


def told(folder: Path, name: str, config: Any, model: Any) -> BackboneFacts:
    """Return what the compiler reads out of a model's config."""
    write_zoo_config(folder, name, config, model)
    return read_config_facts(folder, source=name, identity=name)


def counted(model: torch.nn.Module) -> int:
    """Return the parameters of the text model in a model."""
    parts = text_model(model).named_parameters()
    return sum(weight.numel() for part, weight in parts if OTHER_SENSES not in part)
