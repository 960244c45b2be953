#!/usr/bin/env bash
# transformers 5.23.0: a model takes the name of a registered attention function, never calls it, and
# loses its causal mask on top. Bloom, CodeGen and XGLM then let every token see the future.
#
# Expected: a function registered in AttentionInterface is called in each layer, or the model refuses
# the name; Falcon and GPT-J do the latter. For a registered name no mask is made unless one is
# registered for it too, which is right for functions that are causal by themselves, as this one is:
# Llama calls it and is causal. The three have attention code of their own that knows no interface; it
# runs as always, but without the mask. Nothing is raised and the logits look reasonable.
#
# Seen: llama calls 4, last token moves first logits: False; bloom, codegen, xglm calls 0, moves: True
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
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    LlamaConfig,
    XGLMConfig,
)

calls = 0


def causal(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    global calls
    calls += 1
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal)
configs = [
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    ),
    BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    CodeGenConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64),
    XGLMConfig(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, vocab_size=64),
]


@torch.no_grad()
def future_is_seen(config, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    ids = torch.arange(3, 11)[None]
    other = ids.clone()
    other[0, -1] = 50
    return not torch.equal(model(ids).logits[0, 0], model(other).logits[0, 0])


for config in configs:
    calls = 0
    own = future_is_seen(config, "causal")
    print(f"{config.model_type} calls {calls}, last token moves first logits: {own}")
    if future_is_seen(config, "eager"):
        sys.exit(f"changed: {config.model_type} is not causal with its own attention")
    if config.model_type == "llama":
        if own or calls != 4:
            sys.exit("changed: Llama does not call the registered function, or is not causal")
    elif not own or calls:
        sys.exit(f"changed: {config.model_type} calls the registered function, or stays causal")
PY
