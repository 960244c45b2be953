"""docs/backbones.md: which model types run, from the zoo, its figures and the check of configs.

`python tests/export/backbones_page.py` writes it; a test holds it against all three.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.zoo import SEEING, ZOO, exercised
from recmas_compiler.backbones.facts import read_config_facts
from recmas_runtime.core.errors import RecmasError

PAGE: Final = Path(__file__).parents[2] / "docs/backbones.md"
# The largest differences that `make test-families` measured.
FIGURES: Final = Path(__file__).with_name("backbones.json")

_BEGINNING: Final = """# Backbones

Made by `python tests/export/backbones_page.py` from what `make test-families` measured. There is no
code per architecture: a model attends, masks, caches and computes its experts through interfaces of
transformers, which recmas fills in while it traces; attention code that reads none of them gets its
masks from one. `recmasc check` refuses what no build can make, from `config.json` alone: a test
holds what it says of every causal model type of transformers against a build.

RIGHT: of a tiny random model of that type, hidden states and logits of a ragged batch were compared
with transformers: prompt, parts of it and steps, past any window, over the portable decoder and
that of the CPU, and the reference. The figure is the largest difference, relative to the
largest number. Of models that also see or hear it is their text model.

"""

_HEAD: Final = """
| model type | | figure | exercised besides, or why not |
|---|---|---|---|
"""

_ENCODERS: Final = """Encoders, and decoders that read what an encoder made of another
text, are refused whatever of them would run:"""

_END: Final = """
## A token's own inputs

Gemma 3n and Gemma 4 E2B/E4B give every layer an input that is looked up by the token at a position,
besides the embedding. A thought is no token. transformers takes the padding token's inputs where
it has none (for the rows of an image), so thoughts would be read as padding in every layer: those
models were not trained on that, and nothing measures what it costs. So they are refused until
somebody has tried. Gemma 4 without such inputs is not concerned.

## Models that loop their own layers

Where transformers' code unrolls such a loop into a cache of one entry for every visit, the model
runs as one of more layers than it has weights for (`hrm_text`). Those whose code comes with their
weights (`ouro`, `huginn_raven`), those whose passes send each other messages (`inkling2_loop`, of
transformers 5.24 on), and configs that ask a plain model for several passes (`total_ut_steps`,
`loop_num_passes`, `mean_recurrence`), which transformers would run once, are refused by `recmasc
check` (RM202). What a loop of thoughts is worth on any backbone is the baseline
[`looplm`](evaluation.md#controls-and-baselines).

## Keys that are chosen

Layers that score keys and attend to the best of them (`indexed_attention` and its kin) choose by
what was computed: no rule of positions says which rows of a cache a step reads, and the scores need
rows of their own. They are refused. A MiniMax-M3 as released has such layers, by its
`sparse_attention_config`; the row above is one without.

## Rotary scaling by length

`longrope` and `dynamic` choose their frequencies by the length of the input. Rows that are in a
cache were rotated with those of their time, so a sequence that grows past the border would be
another one than transformers computes at once. So the border is the longest sequence that recmas
gives such a model: `original_max_position_embeddings` for `longrope` (4,096 for a Phi-3 with 128k),
`max_position_embeddings` for `dynamic`. A spec that needs more is refused as any other.

## Experts

An expert layer is traced through transformers' experts interface, whatever its router, and written
in two forms that read the same bytes:

- **On a CPU** one operator of ONNX Runtime, `MoE`, or `QMoE` where weights are in blocks of
  integers. It knows gates of the kind `g * sigmoid(alpha g) * (u + beta)`, with limits and biases
  (SwiGLU, gpt-oss), and ReLU, SiLU and tanh-GELU without a gate; which one a model has is computed,
  not read off its code. Layers with another activation, or a norm behind each expert, take the
  other form.
- **Elsewhere** standard operators: few positions look up the matrices of the experts that they
  take, and copy those; with more, a `Scan` goes through the experts, each with the positions that
  take it, and copies none. Engines of TensorRT have the lookup alone, which a long prompt of a
  large model has no memory for.

`precision: int8` and `int4` hold experts in blocks, in both forms, where the model's width and the
experts' are multiples of 32; otherwise experts stay numbers. What chooses experts is never rounded,
and experts are rounded to the nearest number: they have no compensated rounding. With other
operators than `QMoE`, 8-bit and 4-bit matrices are widened before they are multiplied.
`recmasc plan` counts all experts, a step's floor those that a position takes. A build holds the
first matrices of all experts twice while it works. ONNX Runtime before 1.31 runs `QMoE` slower than
float32, and opens no bundle with it that was built with a later version.

GPT-OSS is published in MXFP4, which `check` refuses by name: take a bfloat16 copy. Attention sinks
are computed with standard operators, so such
models have no decoder of their own for the CPU; neither have those with attention code of their
own.
"""


def page_text() -> str:
    """Return the page."""
    figures = json.loads(FIGURES.read_bytes())
    rows = sorted((*ZOO, *SEEING))
    run = {name.partition(" ")[0] for name in rows}
    lines = {
        name: f"| {name} | RIGHT | {_figure(figures, name)} | {', '.join(exercised(name)) or '-'} |"
        for name in rows
    }
    encoders = []
    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - run:
        reason = _reason(name)
        if reason is None:
            lines[name] = (
                f"| {name} | not shown | - | `check` takes it, no test has a model of it |"
            )
        elif any(words in reason for words in ("encoder", "not a causal language model")):
            encoders.append(f"`{name}`")
        else:
            lines[name] = f"| {name} | refused | - | {reason} |"
    table = "\n".join(lines[name] for name in sorted(lines))
    count = f"{len(run)} model types run.\n"
    end = ", ".join(sorted(encoders))
    return f"{_BEGINNING}{count}{_HEAD}{table}\n\n{_ENCODERS} {end}.\n{_END}"


def _figure(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.0e}" if name in figures else "to be measured"


def _reason(model_type: str) -> str | None:
    """Return why `check` refuses the config that a type's class fills in, None if it does not."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except StrictDataclassError:
        return "its class refuses what it fills in itself"
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            read_config_facts(Path(folder), source=model_type, identity=model_type)
        except RecmasError as error:
            message = error.problems[0].message
            return message.partition(f"`{model_type}`: ")[2].rstrip(".")
    return None


if __name__ == "__main__":
    PAGE.write_text(page_text())
