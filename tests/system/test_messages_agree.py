"""Every kind of message over several families at once: engines and reference agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kit.bundles import BuildTiny, tiny_builder
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from kit.traced import assert_messages_agree, run_traced
from recmas_compiler.lowering.choose_layers import score_layers
from recmas_compiler.lowering.named_layers import best_layers
from recmas_compiler.lowering.reference import load_backbones
from recmas_export.replan import Replanner
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.bundle import open_bundle

HEAD = """
recmas: 1
name: tiny
latent_steps: 3
build: {max_prompt_tokens: 640, max_batch: 4}
"""
ALL = """
backbones:
  small: {source: llama}
  other: {source: qwen3}
  third: {source: gemma3}
"""

# Every kind once, in two rounds; the scribe thinks and writes, and sends four ways.
EVERY_KIND = f"""{HEAD}{ALL}rounds: 2
agents:
  reader:
    backbone: third
    inner: {{init: random}}
    prompt: "Read {{{{ context }}}} for {{{{ question }}}}"
  scribe:
    backbone: other
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.reader }}}} Write."
      then: "{{{{ question }}}} {{{{ latent.reader }}}} {{{{ latent.solver }}}} Write."
  twin:
    backbone: other
    inner: {{init: random}}
    prompt: "{{{{ latent.scribe }}}} Go on: {{{{ question }}}}"
  holder:
    backbone: third
    inner: {{init: random}}
    prompt: "Not {{{{ facts[0] }}}} but {{{{ facts[1] }}}} alone"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt: |-
      {{{{ question }}}} {{{{ latent.reader }}}} and {{{{ latent.scribe }}}},
      {{{{ latent.twin }}}} {{{{ latent.holder }}}} end
links:
  reader -> scribe: {{carries: context, of: context, every: 3, init: random}}
  reader -> solver: {{carries: context, pool: true, init: random}}
  scribe -> twin: {{carries: cache, rows: [context, thoughts]}}
  scribe -> solver: {{carries: written, max_tokens: 5, init: random}}
  twin -> solver: {{carries: text, max_tokens: 6}}
  holder -> solver: {{carries: context, of: 'facts[1]', init: random}}
  solver -> scribe: {{carries: context, feedback: true, init: random}}
answer: {{agent: solver, max_new_tokens: 10}}
"""

# Rows of what was written, of a batch of two, and of an agent's own round before.
ROWS = f"""{HEAD}
backbones: {{third: {{source: gemma3}}}}
rounds: 3
agents:
  left: {{backbone: third, inner: {{init: random}}, prompt: "Left {{{{ question }}}}"}}
  loop:
    backbone: third
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.left }}}}"
      then: "{{{{ latent.loop }}}} {{{{ question }}}} {{{{ latent.left }}}}"
links:
  left -> loop: {{carries: thoughts, init: random}}
  loop -> loop: {{carries: cache, rows: [context, written], max_tokens: 4, feedback: true}}
answer: {{agent: loop, max_new_tokens: 10}}
"""

# Rows of two links that other layers see, of one those that the build chooses; the receiver thinks
# and writes behind them.
LAYERS = f"""{HEAD}
backbones: {{small: {{source: llama}}}}
rounds: 2
agents:
  left:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "Left {{{{ context }}}}"
      then: "Left {{{{ context }}}} {{{{ latent.solver }}}}"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "{{{{ latent.left }}}} {{{{ question }}}}"
      then: "{{{{ latent.left }}}} {{{{ latent.solver }}}} {{{{ question }}}}"
links:
  left -> solver: {{carries: cache, layers: 0.4}}
  solver -> solver: {{carries: cache, rows: [context, thoughts], layers: [0, 2], feedback: true}}
  solver -> left: {{carries: written, max_tokens: 4, feedback: true, init: random}}
answer: {{agent: solver, max_new_tokens: 10}}
"""

SPECS = {"every kind": EVERY_KIND, "rows": ROWS, "layers": LAYERS}
CONTEXTS = ("Seven times eight is 56.", "", "Anna reads. " * 6, "x y")
QUESTIONS = ("What is 7 * 8?", "x", "Which plan is best, and why?", "Hm?")
RECORDS = [
    {"id": str(i), "question": question, "context": context, "facts": [question, context]}
    for i, (question, context) in enumerate(zip(QUESTIONS, CONTEXTS, strict=True))
]


@pytest.fixture(scope="module")
def build_mixed(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> BuildTiny:
    """Build a spec over `llama`, `qwen3` and `gemma3` of widths 64, 48 and 32; once per text."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, (family, width) in enumerate((("llama", 64), ("qwen3", 48), ("gemma3", 32))):
        write_tiny_backbone(folder / family, family, seed=seed, hidden_size=width)
    return tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.mark.parametrize("name", SPECS)
def test_engines_and_reference_agree(name: str, build_mixed: BuildTiny, tmp_path: Path) -> None:
    built = build_mixed(SPECS[name])
    single, messages = run_traced(built.system, tmp_path / "one", RECORDS, batch=1)
    ragged, _ = run_traced(built.system, tmp_path / "many", RECORDS, batch=len(RECORDS))
    reference = built.reference(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == reference.texts
    assert [a.usage for a in single] == [a.usage for a in ragged]
    assert_messages_agree(messages, reference)


def test_a_build_chooses_layers_and_says_by_what(build_mixed: BuildTiny) -> None:
    built = build_mixed(LAYERS)
    (scores,) = built.system.manifest.layer_scores.values()
    layers = built.system.plan.links["left->solver"].layers
    assert layers == best_layers(scores, 0.4)
    entry = built.system.manifest.backbones["small"]
    assert {layer for group in entry.masked_layers for layer in group} == {0, 1, 2} - (
        {0, 2} & set(layers)
    )
    assert Replanner(open_bundle(built.bundle)).plan(rounds=2) == built.system.plan
    # Chosen again, they are the same: nothing is drawn.
    backbones = load_backbones(built.program, progress=Silent())
    again = score_layers(backbones["small"])
    assert best_layers(again, 0.4) == layers
    np.testing.assert_allclose(again.attention, scores.attention, atol=1e-5)
