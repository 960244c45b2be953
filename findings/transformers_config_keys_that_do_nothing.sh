#!/usr/bin/env bash
# transformers 5.23.0: three entries of config.json are read, kept, documented or printed back, and
# change no number: DBRX's attn_config.rope_theta, Gemma 3's attn_logit_softcapping and Nemotron-H's
# sliding_window.
#
# Expected: an entry that a config class names is applied, or refused. DBRX's is where its class keeps
# the base of the rotation; the model rotates with rope_parameters, which then holds the default 10000.
# Gemma 2 applies the soft cap of the same name, and Gemma 3 its cap of the final logits.
#
# Seen: logits move by 0 for each of the three; by 2.4 for DBRX's rope_parameters, 0.65 for Gemma 2's
# attn_logit_softcapping and 4.5 for Gemma 3's final_logit_softcapping
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
    AutoModelForCausalLM,
    DbrxConfig,
    Gemma2Config,
    Gemma3TextConfig,
    NemotronHConfig,
)

gemma = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}


def dbrx(rope_theta=10000.0, **rest):
    return DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": rope_theta},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
        **rest,
    )


def nemotron_h(**rest):
    return NemotronHConfig(
        hidden_size=64,
        intermediate_size=64,
        vocab_size=64,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **rest,
    )


@torch.no_grad()
def logits(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model(torch.arange(3, 19)[None]).logits


rope = {"rope_type": "default", "rope_theta": 500000.0}
without = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
pairs = {
    "dbrx attn_config.rope_theta": (dbrx(), dbrx(500000.0), False),
    "dbrx rope_parameters": (dbrx(), dbrx(rope_parameters=rope), True),
    "gemma3 attn_logit_softcapping": (
        Gemma3TextConfig(**gemma, **without),
        Gemma3TextConfig(**gemma, **{**without, "attn_logit_softcapping": 0.1}),
        False,
    ),
    "gemma3 final_logit_softcapping": (
        Gemma3TextConfig(**gemma, **without),
        Gemma3TextConfig(**gemma, **{**without, "final_logit_softcapping": 0.1}),
        True,
    ),
    "gemma2 attn_logit_softcapping": (
        Gemma2Config(**gemma, **without),
        Gemma2Config(**gemma, **{**without, "attn_logit_softcapping": 0.1}),
        True,
    ),
    "nemotron_h sliding_window": (nemotron_h(), nemotron_h(sliding_window=4), False),
}
for name, (one, other, works) in pairs.items():
    moved = (logits(one) - logits(other)).abs().max().item()
    print(f"{name} moves the logits by {moved:.2g}")
    if (moved > 0.1) != works or (moved != 0) != works:
        sys.exit(f"changed: {name} has another effect")
PY
