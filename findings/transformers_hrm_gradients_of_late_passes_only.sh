#!/usr/bin/env bash
# transformers 5.23.0: the gradient of a frozen HRM-Text model in eval mode is not that of its output.
#
# Expected: whoever tunes what comes before a frozen model (a soft prompt, a link, an adapter of
# inputs) gets the derivative of its output from autograd. HRM runs the early passes over its layers
# under torch.no_grad() inside of forward, in training and evaluation alike, as it was pretrained.
# `L_bp_cycles`, documented as something for training, decides how many; nothing warns.
#
# Seen: by default autograd says -0.36 where the output changes by -1.44; with L_bp_cycles=[3, 3] both
# are -1.936
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)


def slopes(**more):
    config = AutoConfig.for_model(
        "hrm_text",
        num_hidden_layers=1,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        head_dim=8,
        vocab_size=64,
        initializer_range=0.1,
        embedding_scale=1.0,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config).eval().double().requires_grad_(False)
    embeds = 0.3 * torch.randn(1, 5, 32, dtype=torch.float64)
    direction = torch.randn_like(embeds)

    def chance(embeds):
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        return logits[0, -1].log_softmax(-1)[7]

    (gradient,) = torch.autograd.grad(chance(embeds.requires_grad_()), embeds)
    with torch.no_grad():
        step = 3e-4 * direction
        changed = (chance(embeds + step) - chance(embeds - step)) / (2 * 3e-4)
    return float((gradient * direction).sum()), float(changed)


told, true = slopes()
print(f"by default: autograd {told:.4f}, differences {true:.4f}")
if abs(told - true) < 0.01 * abs(true):
    sys.exit("changed: the gradient is that of the output")
told, true = slopes(L_bp_cycles=[3, 3])
print(f"all passes: autograd {told:.4f}, differences {true:.4f}")
if abs(told - true) > 0.01 * abs(true):
    sys.exit("changed: L_bp_cycles means something else")
PY
