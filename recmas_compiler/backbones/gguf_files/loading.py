"""A GGUF file as transformers takes it: configuration, weights and tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from recmas_compiler.backbones.gguf_files.config import config_of
from recmas_compiler.backbones.gguf_files.header import GgufHeader
from recmas_compiler.backbones.gguf_files.tokenizer import make_tokenizer, special_tokens
from recmas_compiler.backbones.gguf_files.weights import gguf_weights


def transformers_parts(header: GgufHeader) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration and the weights, in float32, of a file's model.

    Raises:
        GgufError: See `config_of`.
    """
    config = config_of(header)
    entries = {name: value for name, value in config.items() if name != "model_type"}
    weights = {name: torch.from_numpy(array) for name, array in gguf_weights(header, config)}
    return AutoConfig.for_model(config["model_type"], **entries), weights


def transformers_tokenizer(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file, with its special tokens and its chat template.

    Raises:
        GgufError: See `make_tokenizer`.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(header.values),
        chat_template=header.values.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special_tokens(header.values),
    )
