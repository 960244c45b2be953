"""Tiny random models of many model types, as Hugging Face folders: what each exercises, in a table.

Weights are random but scaled so that every part matters; the tokenizer is that of a family in
`kit.models`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from kit.models import COMMON_DIMS, FAMILIES, make_tokenizer

_KIND: Final = "qwen2"  # whose tokenizer and template all have
_WINDOW: Final = {"sliding_window": 12}
_MIXED: Final = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_NOT_GIVEN: Final = object()  # an entry that the type does not have

# name -> entries of its config besides the common ones; the model type is the name's beginning
ZOO: Final[Mapping[str, dict[str, Any]]] = {
    "gpt_neox": {"num_key_value_heads": _NOT_GIVEN, "rotary_pct": 0.5},
    "granitemoehybrid attention": {
        "layer_types": ["attention", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "position_embedding_type": "rope",
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
    },
    "granite": {
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_MIXED, "logit_scale": 0.5},
    "helium": {"head_dim": 16, "num_key_value_heads": 4},
    "hyperclovax": {
        "attention_multiplier": 0.4,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.6,
        "embedding_multiplier": 3.0,
    },
}


def write_zoo_model(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write the tiny model of a row of `ZOO` with its tokenizer; returns its folder."""
    kind, tokenizer = FAMILIES[_KIND], make_tokenizer(_KIND)
    common = {**COMMON_DIMS, "num_hidden_layers": 2, "vocab_size": tokenizer.get_vocab_size()}
    entries = {key: v for key, v in {**common, **ZOO[name]}.items() if v is not _NOT_GIVEN}
    end, pad = tokenizer.token_to_id(kind.eos), tokenizer.token_to_id(kind.pad)
    config = AutoConfig.for_model(
        name.partition(" ")[0], bos_token_id=None, eos_token_id=end, pad_token_id=pad, **entries
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if id(weight) in tables:
                weight.copy_(noise * 0.6)
            elif "sinks" in part:
                weight.copy_(0.5 + 1.5 * noise)
            elif weight.ndim == 1 or "bias" in part:
                weight.add_(noise * 0.1)
            else:
                weight.copy_(noise * 0.7 / math.sqrt(weight.shape[-1]))
    config.architectures = [type(model).__name__]
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(kind.template, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": kind.eos,
        "pad_token": kind.pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
