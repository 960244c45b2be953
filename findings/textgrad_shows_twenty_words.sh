#!/usr/bin/env bash
# textgrad 0.1.8: the optimiser that is to improve a prompt, and the engine that criticises it, are
# shown the first ten and the last ten words of it; what stands between them is "(...)".
#
# Expected: `TextualGradientDescent` sends the variable that it wants improved. It sends
# `variable.get_short_value()` as <VARIABLE>, and there is no option for more. A prompt whose fields
# ("{question}") or rules stand in its middle comes back without them, since nobody has seen them,
# unless the prompt also happens to be part of the criticised conversation.
# Also: importing it opens ./logs/DATE.jsonl for all prompts, and litellm asks the network for prices.
#
# Seen: of 60 words the optimiser sees 20, rule 30 is not among them; logs made by the import: 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet textgrad==0.1.8 litellm==1.110.2
mkdir "$work/empty"
cd "$work/empty"
LITELLM_LOCAL_MODEL_COST_MAP=True "$work/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import textgrad

seen = []


class Engine(textgrad.EngineLM):
    model_string = "none"

    def generate(self, prompt, system_prompt=None, **kwargs):
        seen.append(prompt)
        return "<IMPROVED_VARIABLE>new</IMPROVED_VARIABLE>"

    __call__ = generate


words = [f"rule{i}" for i in range(60)]
prompt = textgrad.Variable(" ".join(words), role_description="a prompt")
prompt.gradients.add(textgrad.Variable("Be clearer.", role_description="feedback"))
textgrad.TextualGradientDescent(parameters=[prompt], engine=Engine()).step()
shown = [word for word in words if word in seen[0].split()]
logs = len(list(Path("logs").glob("*.jsonl")))
there = "is" if "rule30" in shown else "is not"
print(
    f"of {len(words)} words the optimiser sees {len(shown)}, rule 30 {there} among them; "
    f"logs made by the import: {logs}"
)
if len(shown) == len(words) or not logs:
    sys.exit("changed: the optimiser sees the whole text, or the import writes nothing")
PY
