"""docs/backbones.md: which model types run, made from the table of the tests and that of configs.

`python tests/export/backbones_page.py` writes it; a test holds it against both tables.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.zoo import ZOO, exercised
from recmas_compiler.backbones.config.defaults import family_defaults, known_types
from recmas_compiler.backbones.config.unsupported import why_unsupported
from recmas_compiler.backbones.facts import LAYER_KINDS

PAGE: Final = Path(__file__).parents[2] / "docs/backbones.md"

_BEGINNING: Final = """# Backbones

Made by `python tests/export/backbones_page.py`. There is no code per architecture: a model
attends, masks, caches and computes its experts through interfaces of transformers, which recmas
fills in while it traces. `recmasc check` refuses what it can tell from `config.json`; whatever
else goes wrong the parity gate of `recmasc build` finds.

## Run

A tiny random model of each is compared with transformers by `make test-families`: hidden states
and logits of a ragged batch, prompt and steps, past any window, over the portable decoder and
that of the CPU, and the reference.

| model type | exercised besides |
|---|---|
"""

_EXPERTS: Final = """
### Experts

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
are computed with standard operators, on the CPU too.

## Refused by `check`

| reason | model types |
|---|---|
"""

_END: Final = """
Types that are in neither table are untried: `check` may accept them, and the parity gate decides.
"""


def page_text() -> str:
    """Return the page."""
    rows = [f"| {name} | {', '.join(exercised(name)) or '-'} |" for name in sorted(ZOO)]
    refused: dict[str, list[str]] = defaultdict(list)
    run = {name.partition(" ")[0] for name in ZOO}
    for model_type in known_types():
        reason = _reason(model_type)
        if reason is not None and model_type not in run:
            refused[reason].append(model_type)
    lines = [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(refused.items())]
    return _BEGINNING + "\n".join(rows) + "\n" + _EXPERTS + "\n".join(lines) + "\n" + _END


def _reason(model_type: str) -> str | None:
    family = family_defaults(model_type)
    found = why_unsupported(model_type, family)
    if found is not None:
        return found.replace(f"the code of `{model_type}`", "its code").replace(
            f"`{model_type}`", "it"
        )
    kinds = {LAYER_KINDS.get(kind) for kind in family.get("layer_cycle", ())}
    if "linear" in kinds:
        return "it keeps a state instead of a cache of positions in some or all of its layers"
    return "its layers are of a type that is not known" if None in kinds else None


if __name__ == "__main__":
    PAGE.write_text(page_text())
