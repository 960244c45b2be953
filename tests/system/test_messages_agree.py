"""Every kind of message over several families at once: engines and reference agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.bundles import BuildTiny, tiny_builder
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from kit.traced import assert_messages_agree, run_traced

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
  solver:
    backbone: small
    inner: {{init: random}}
    prompt: |-
      {{{{ question }}}} {{{{ latent.reader }}}} and {{{{ latent.scribe }}}},
      {{{{ latent.twin }}}} end
links:
  reader -> scribe: {{carries: context, of: context, every: 3, init: random}}
  reader -> solver: {{carries: context, pool: true, init: random}}
  scribe -> twin: {{carries: cache, rows: [context, thoughts]}}
  scribe -> solver: {{carries: written, max_tokens: 5, init: random}}
  twin -> solver: {{carries: text, max_tokens: 6}}
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

SPECS = {"every kind": EVERY_KIND, "rows": ROWS}
CONTEXTS = ("Seven times eight is 56.", "", "Anna reads. " * 6, "x y")
QUESTIONS = ("What is 7 * 8?", "x", "Which plan is best, and why?", "Hm?")
RECORDS = [
    {"id": str(i), "question": question, "context": context}
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
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == reference.texts
    assert [a.usage for a in single] == [a.usage for a in ragged]
    assert_messages_agree(messages, reference)
    assert texts == naive.texts
    assert reference.handover_texts == naive.handover_texts
    assert_messages_agree(messages, naive)
