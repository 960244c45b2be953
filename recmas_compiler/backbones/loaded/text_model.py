"""The language model inside a model that also takes pictures or sound."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from recmas_compiler.backbones.loaded.own_head import body_of


def wraps_text_model(config: Any) -> bool:
    """Whether a config is that of a model with a language model inside."""
    return config.get_text_config() is not config


def text_model(model: Any) -> Any:
    """Return the text-only model inside a model that also has other inputs; others as they are.

    That is a causal model of its own where transformers has a class for it, and else the model
    without what does not read text.
    """
    config = model.config.get_text_config()
    if config is model.config:
        return model
    text = model.get_decoder()
    if text.get_output_embeddings() is None:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            _drop_all_but(model, body_of(model))
            return model
        with torch.device("meta"):
            text = AutoModelForCausalLM.from_config(config)
        setattr(text, text.base_model_prefix, model.get_decoder())
        text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    return text


def _drop_all_but(model: Any, body: Any) -> None:
    """Take out of a model every part but its body, what holds that, and its head."""
    head = model.get_output_embeddings()
    part = model
    while part is not body:
        parts = dict(part.named_children())
        (inside,) = (n for n, child in parts.items() if any(m is body for m in child.modules()))
        for name, other in parts.items():
            if name != inside and other is not head:
                setattr(part, name, None)
        part = parts[inside]
