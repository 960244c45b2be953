"""Every kind of message: engines, reference and the naive form agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.bundles import BuildTiny, Built, tiny_builder
from kit.files import MadeOnce
from kit.models import write_mixed_backbones
from kit.specs import ALL, HEAD
from kit.traced import assert_messages_agree, run_shared, run_traced
from kit.zoo import write_zoo_model
from recmas_runtime.cli.inspect import bundle_text, form_text
from recmas_runtime.cli.thoughts import handover_texts
from recmas_runtime.formats.bundle import open_bundle
from recmas_runtime.running.run_trace import RECORDS_NAME

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

# Two who write as one batch, of whom one takes rows itself from the second round on; the solver has
# rows of both before its prompt, in windows of eight.
SENDERS = f"""{HEAD}
backbones: {{third: {{source: gemma3}}}}
rounds: 3
agents:
  left:
    backbone: third
    inner: {{init: random}}
    prompt:
      first: "Left {{{{ question }}}}"
      then: "{{{{ latent.solver }}}} Left {{{{ question }}}}"
  right:
    backbone: third
    inner: {{init: random}}
    system: "Read {{{{ context }}}}"
    prompt:
      first: "Right {{{{ question }}}}"
      then: "Right {{{{ question }}}} {{{{ latent.solver }}}}"
  solver:
    backbone: third
    latent_steps: 2
    inner: {{init: random}}
    prompt: "{{{{ latent.right }}}}{{{{ latent.left }}}} Then {{{{ question }}}}"
links:
  left -> solver: {{carries: cache, rows: [context, written], max_tokens: 5}}
  right -> solver: {{carries: cache, rows: written, max_tokens: 5}}
  solver -> left: {{carries: cache, feedback: true}}
  solver -> right: {{carries: context, pool: true, feedback: true, init: random}}
answer: {{agent: solver, max_new_tokens: 10}}
"""

# Nothing but rows; nobody thinks, so no state of a latent step is ever there.
ONLY_ROWS = f"""{HEAD.replace("latent_steps: 3", "latent_steps: 0")}
backbones: {{small: {{source: llama}}}}
rounds: 2
agents:
  reader: {{backbone: small, prompt: "Read {{{{ context }}}}"}}
  judge:
    backbone: small
    prompt:
      first: "{{{{ latent.reader }}}} Judge {{{{ question }}}}"
      then: "{{{{ latent.reader }}}} {{{{ latent.solver }}}} Judge {{{{ question }}}}"
  solver: {{backbone: small, prompt: "{{{{ latent.judge }}}} Solve {{{{ question }}}}"}}
links:
  reader -> judge: {{carries: cache}}
  judge -> solver: {{carries: cache}}
  solver -> judge: {{carries: cache, feedback: true}}
answer: {{agent: solver, max_new_tokens: 10}}
"""

# A recursion that ends early, with rows, texts and contexts beside the thoughts that decide it.
EARLY = f"""{HEAD}
backbones: {{small: {{source: llama}}}}
rounds: 5
agents:
  reader:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "Read {{{{ context }}}}"
      then: "{{{{ latent.solver }}}} Read {{{{ context }}}} {{{{ latent.judge }}}}"
  judge:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "Judge {{{{ question }}}} {{{{ latent.reader }}}}"
      then: "Judge {{{{ question }}}} {{{{ latent.reader }}}} {{{{ latent.judge }}}}"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.judge }}}}"
      then: "{{{{ question }}}} {{{{ latent.judge }}}} {{{{ latent.solver }}}}"
links:
  reader -> judge: {{carries: text, max_tokens: 5}}
  judge -> solver: {{carries: written, max_tokens: 5, init: random}}
  judge -> judge: {{carries: context, every: 4, init: random, feedback: true}}
  judge -> reader: {{carries: text, max_tokens: 5, feedback: true}}
  solver -> reader: {{carries: cache, feedback: true}}
  solver -> solver: {{init: random, feedback: true}}
answer: {{agent: solver, max_new_tokens: 10, stop_when: {{cosine: 0.9}}}}
"""

# Layers that keep a state cannot go back: two that write as one batch run their prompts again.
STATES = f"""{HEAD}
backbones:
  state: {{source: state}}
  small: {{source: llama}}
rounds: 2
agents:
  reader:
    backbone: state
    inner: {{init: random}}
    prompt:
      first: "Read {{{{ context }}}} for {{{{ question }}}}"
      then: "Read {{{{ context }}}} for {{{{ question }}}} {{{{ latent.solver }}}}"
  scribe:
    backbone: state
    inner: {{init: random}}
    prompt: "Write of {{{{ question }}}}"
  solver:
    backbone: small
    inner: {{init: random}}
    prompt: "{{{{ question }}}} {{{{ latent.reader }}}} and {{{{ latent.scribe }}}}"
  keeper:
    backbone: small
    inner: {{init: random}}
    prompt: |-
      {{{{ latent.solver }}}} {{{{ question }}}} {{{{ latent.reader }}}} {{{{ latent.scribe }}}}
links:
  reader -> solver: {{carries: context, of: context, init: random}}
  scribe -> solver: {{carries: written, max_tokens: 5, init: random}}
  reader -> keeper: {{carries: text, max_tokens: 5}}
  scribe -> keeper: {{init: random}}
  solver -> keeper: {{carries: cache, rows: thoughts}}
  solver -> reader: {{carries: written, max_tokens: 4, init: random, feedback: true}}
answer: {{agent: keeper, max_new_tokens: 10}}
"""

SPECS = {
    "every kind": EVERY_KIND,
    "rows": ROWS,
    "senders of rows": SENDERS,
    "only rows": ONLY_ROWS,
    "an early end": EARLY,
    "layer states": STATES,
}
CONTEXTS = ("Seven times eight is 56.", "", "Anna reads. " * 6, "x y")
QUESTIONS = ("What is 7 * 8?", "x", "Which plan is best, and why?", "Hm?")
RECORDS = [
    {"id": str(i), "question": question, "context": context, "facts": [question, context]}
    for i, (question, context) in enumerate(zip(QUESTIONS, CONTEXTS, strict=True))
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, families: Path) -> Path:
    """A folder with the tiny families, and `state` of gated DeltaNet."""
    root = tmp_path_factory.mktemp("messages")
    write_zoo_model(root / "state", "qwen3_5_text")
    for family in families.iterdir():
        (root / family.name).symlink_to(family)
    return root


@pytest.mark.parametrize("name", SPECS)
def test_engines_and_reference_agree(
    name: str, build_tiny: BuildTiny, folder: Path, tmp_path: Path
) -> None:
    built = build_tiny(SPECS[name], base_dir=folder)
    rounds = assert_all_forms_agree(built, tmp_path)
    assert (min(rounds) < built.system.plan.rounds) == (name == "an early end")
    shown = bundle_text(open_bundle(built.bundle))
    assert all(form_text(link) in shown for link in built.system.plan.links.values())


@pytest.mark.families
def test_backbones_of_different_widths(
    made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_backbones(folder)
    build = tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")
    assert_all_forms_agree(build(EVERY_KIND), tmp_path)


def assert_all_forms_agree(built: Built, folder: Path) -> list[int]:
    """Compare engines, one by one and together, with both other forms; returns rounds."""
    single, messages = run_traced(built.system, folder / "one", RECORDS, batch=1)
    ragged, others = run_traced(built.system, folder / "many", RECORDS, batch=len(RECORDS))
    shared, exchanged = run_shared(built.system, folder / "shared", RECORDS, chunk=5)
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == [answer.answer for answer in shared]
    assert [a.usage for a in single] == [a.usage for a in ragged] == [a.usage for a in shared]
    assert len(set(texts)) > 1, "texts that prove nothing"
    for result in (reference, naive):
        assert texts == result.texts
        assert [answer.rounds for answer in single] == result.rounds
        assert_messages_agree(messages, result)
        assert_messages_agree(others, result)
        assert_messages_agree(exchanged, result)
    for found, expected in zip(reference.handover_texts, naive.handover_texts, strict=True):
        assert found == {name: expected[name] for name in found}
    alone, together = read_trace(folder / "one"), read_trace(folder / "many")
    for line, found in zip(alone, reference.handover_texts, strict=True):
        texts = handover_texts(line)
        for message, text in found.items():
            link, _, round_ = message.partition("@")
            assert texts[int(round_), link.partition("->")[0]] == text
    assert [handover_texts(line) for line in alone] == [handover_texts(line) for line in together]
    hands = any(link.carries == "cache" for link in built.system.plan.links.values())
    assert all(bool(rows_of(line)) == hands for line in (*alone, *together))
    return reference.rounds


def read_trace(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS_NAME).read_text().splitlines()]


def rows_of(line: dict[str, Any]) -> list[int]:
    """Return how many rows each step handed over that handed over any."""
    return [step["handed_rows"] for step in line["steps"] if step.get("handed_bytes")]
