"""docs/backbones.md: which model types run, made from the table of the tests and that of configs.

`python tests/export/backbones_page.py` writes it; a test holds it against both tables.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from kit.zoo import SEEING, ZOO, exercised
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

Mixtures of experts run in the portable form of transformers (`batched_mm`): for every token the
weights of the experts that it takes are copied, in every layer. That is what a step reads anyway.
A prompt needs that memory for all its tokens at once, which `recmasc plan` counts; how long it
takes has not been measured. Experts are not quantized: with `precision: int8` or `int4`
they are stored as numbers in the backbone's `dtype`, and the rest of the model in blocks.

Attention sinks are computed with standard operators, so such models have no decoder of their own
for the CPU.

## Refused by `check`

| reason | model types |
|---|---|
"""

_END: Final = """
Types that are in neither table are untried: `check` may accept them, and the parity gate decides.
"""


def page_text() -> str:
    """Return the page."""
    rows = [f"| {name} | {', '.join(exercised(name)) or '-'} |" for name in sorted((*ZOO, *SEEING))]
    refused: dict[str, list[str]] = defaultdict(list)
    run = {name.partition(" ")[0] for name in (*ZOO, *SEEING)}
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
