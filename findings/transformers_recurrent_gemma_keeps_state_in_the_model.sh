#!/usr/bin/env bash
# transformers 5.23.0: RecurrentGemma's recurrent and convolution states are attributes of the layers,
# not entries of the cache the caller passes. Two conversations on one model mix, each with a
# DynamicCache of its own.
#
# Expected: what a step depends on besides the weights is in past_key_values, as in Mamba, Bamba or
# Qwen3-Next. Here the cache holds keys and values of the attention layers, and the rest belongs to
# whichever prompt ran last. The cache looks complete, and its length is right.
#
# Seen: one conversation: step agrees with a run without cache to 4e-06; after another prompt has run in
# between, the same step with the same cache is off by 3.4 of 2.6
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import logging
import sys

logging.disable(logging.WARNING)
import torch
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaModel

torch.manual_seed(0)
config = RecurrentGemmaConfig(
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    lru_width=32,
    attention_window_size=16,
    vocab_size=64,
)
model = RecurrentGemmaModel(config).eval()
for weight in model.parameters():
    if weight.dim() > 1:
        torch.nn.init.normal_(weight, std=0.3)
first, second, token = torch.arange(3, 11)[None], torch.arange(40, 48)[None], torch.tensor([[20]])


def prefill(ids):
    cache = DynamicCache(config=config)
    model(ids, use_cache=True, past_key_values=cache)
    return cache


def step(cache):
    at = torch.tensor([[8]])
    out = model(token, position_ids=at, use_cache=True, past_key_values=cache)
    return out.last_hidden_state[:, -1]


with torch.no_grad():
    alone = step(prefill(first))
    cache = prefill(first)
    prefill(second)
    mixed = step(cache)
    whole = model(torch.cat([first, token], 1), use_cache=False).last_hidden_state[:, -1]
near, far = ((got - whole).abs().max().item() for got in (alone, mixed))
print(f"alone off by {near:.1g}, mixed off by {far:.2g} of {whole.abs().max().item():.2g}")
if near > 1e-4 or far < 1e-2:
    sys.exit("changed: the state of a conversation travels with its cache")
PY
