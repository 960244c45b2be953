"""Every pattern over three families at once: engines, reference and naive form agree.

The three backbones have different widths, tokenizers and chat templates; prompts are those of the
patterns themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kit.bundles import BuildTiny, tiny_builder
from kit.files import MadeOnce
from kit.models import write_mixed_backbones
from kit.specs import ALL, HEAD
from kit.traced import run_traced
from recmas_compiler.ir.ops import Prefill
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running.records import Answer

SEQUENTIAL = f"""{HEAD}{ALL}rounds: 3
pattern: {{sequential: [planner, critic, solver]}}
agents:
  planner: {{backbone: small, inner: {{init: random}}}}
  critic: {{backbone: other, latent_steps: 5, inner: {{init: random}}}}
  solver: {{backbone: third, inner: {{init: random}}}}
links:
  planner -> critic: {{init: random}}
  critic -> solver: {{kind: ln_residual, init: random}}
  solver -> planner: {{init: random}}
answer: {{max_new_tokens: 10}}
"""

# Two specialists share a backbone and a batch, the third has one of its own.
MIXTURE = f"""{HEAD}{ALL}rounds: 2
pattern: {{mixture: {{specialists: [math, code, science], summarizer: summarizer}}, task: choice}}
agents:
  math: {{backbone: small, inner: {{init: random}}}}
  code: {{backbone: small, inner: {{init: random}}}}
  science: {{backbone: other, inner: {{init: random}}}}
  summarizer: {{backbone: third, inner: {{init: random}}}}
links:
  math -> summarizer: {{init: random}}
  code -> summarizer: {{kind: residual, init: random}}
  science -> summarizer: {{init: random}}
  summarizer -> math: {{init: random}}
  summarizer -> code: {{init: random}}
  summarizer -> science: {{kind: ln_residual, init: random}}
answer: {{max_new_tokens: 10}}
"""

DISTILLATION = f"""{HEAD}
backbones: {{third: {{source: gemma3}}, other: {{source: qwen3}}}}
rounds: 3
pattern: {{distillation: {{expert: expert, learner: learner}}, task: math}}
agents:
  expert: {{backbone: third, latent_steps: 6, inner: {{init: random}}}}
  learner: {{backbone: other, inner: {{init: random}}}}
links:
  expert -> learner: {{init: random}}
  learner -> expert: {{init: random}}
answer: {{max_new_tokens: 10}}
"""

DELIBERATION = f"""{HEAD}
backbones: {{small: {{source: llama}}, other: {{source: qwen3}}}}
rounds: 2
pattern: {{deliberation: {{reflector: reflector, caller: caller}}, task: search}}
agents:
  reflector: {{backbone: small, inner: {{kind: residual, init: random}}}}
  caller: {{backbone: other, latent_steps: 2, inner: {{init: random}}}}
links:
  reflector -> caller: {{init: random}}
  caller -> reflector: {{init: random}}
answer: {{max_new_tokens: 10}}
"""

# As in specs/diamond.yaml: two feedback links, one of them between the sides.
DIAMOND = f"""{HEAD}{ALL}rounds: 3
agents:
  reader:
    backbone: third
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} What is given?"
      then: "{{{{ question }}}} What is given? Mind {{{{ latent.writer }}}}"
  counter:
    backbone: other
    latent_steps: 5
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} Given {{{{ latent.reader }}}} count."
      then: "{{{{ question }}}} Given {{{{ latent.reader }}}}, {{{{ latent.doubter }}}} count."
  doubter:
    backbone: small
    latent_steps: 4
    inner: {{init: random}}
    prompt: "{{{{ question }}}} Given {{{{ latent.reader }}}} doubt."
  writer:
    backbone: small
    latent_steps: 2
    inner: {{init: random}}
    prompt: "{{{{ question }}}} {{{{ latent.counter }}}} but {{{{ latent.doubter }}}} Answer."
links:
  reader -> counter: {{init: random}}
  reader -> doubter: {{init: random}}
  counter -> writer: {{init: random}}
  doubter -> writer: {{init: random}}
  writer -> reader: {{init: random, feedback: true}}
  doubter -> counter: {{init: random, feedback: true}}
answer: {{agent: writer, max_new_tokens: 10}}
"""

LOOP = f"""{HEAD}
backbones: {{third: {{source: gemma3}}}}
rounds: 5
pattern: {{sequential: [thinker]}}
agents:
  thinker: {{backbone: third, inner: {{init: random}}}}
links:
  thinker -> thinker: {{init: random}}
answer: {{max_new_tokens: 10}}
"""

# What `late` says is heard in the last round only; `a` alone would be settled long before.
AWAITED = f"""{HEAD}
backbones: {{third: {{source: gemma3}}}}
rounds: 6
agents:
  late: {{backbone: third, inner: {{init: random}}, prompt: "Late {{{{ question }}}}"}}
  a:
    backbone: third
    inner: {{init: random}}
    prompt: {{first: "{{{{ question }}}}", then: "{{{{ question }}}} {{{{ latent.a }}}}"}}
  end:
    backbone: third
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.a }}}}"
      then: "{{{{ question }}}} {{{{ latent.a }}}} {{{{ latent.late }}}}"
links:
  a -> a: {{feedback: true, init: random}}
  a -> end: {{init: random}}
  late -> end: {{feedback: true, init: random}}
answer: {{agent: end, max_new_tokens: 10, stop_when: {{cosine: 0.01}}}}
"""

# Each reader sees an entry of a list, and only the solver the question.
SPLIT = f"""{HEAD}
backbones: {{small: {{source: llama}}, third: {{source: gemma3}}}}
agents:
  first:
    backbone: small
    inner: {{init: random}}
    prompt: "Read: {{{{ facts[0] }}}}"
  second:
    backbone: small
    inner: {{init: random}}
    system: "Beside {{{{ facts[0] }}}} there is more."
    prompt: "Read: {{{{ facts[1] }}}}"
  solver:
    backbone: third
    inner: {{init: random}}
    prompt: "{{{{ latent.first }}}} {{{{ latent.second }}}} {{{{ question }}}} Answer."
links:
  first -> solver: {{init: random}}
  second -> solver: {{init: random}}
answer: {{agent: solver, max_new_tokens: 10}}
"""

SPECS = {
    "sequential": SEQUENTIAL,
    "mixture": MIXTURE,
    "distillation": DISTILLATION,
    "deliberation": DELIBERATION,
    "diamond": DIAMOND,
    "self_loop": LOOP,
    "split": SPLIT,
}

CHOICES = ["four", "56", "none"]
RECORDS = [
    {"id": str(i), "question": question, "choices": CHOICES, "facts": [f"Fact {i}.", 7 - i, "x"]}
    for i, question in enumerate(
        ("What is 7 * 8?", "x", "Anna has three plans and an orange. Which plan is best, and why?")
    )
]


@pytest.fixture(scope="module")
def build_mixed(made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory) -> BuildTiny:
    """Build a spec over `llama`, `qwen3` and `gemma3` of widths 64, 48 and 32; once per text."""
    folder = tmp_path_factory.mktemp("mixed")
    write_mixed_backbones(folder)
    return tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.mark.parametrize("name", SPECS)
def test_engines_reference_and_naive_form_agree(
    name: str, build_mixed: BuildTiny, tmp_path: Path
) -> None:
    built = build_mixed(SPECS[name])
    single, messages = run_traced(built.system, tmp_path / "one", RECORDS, batch=1)
    ragged, ragged_messages = run_traced(
        built.system, tmp_path / "many", RECORDS, batch=len(RECORDS)
    )
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == reference.texts
    assert texts == naive.texts
    assert len(set(texts)) > 1, "texts that are all equal prove nothing"
    assert messages
    assert set(messages) == set(ragged_messages) == set(reference.messages)
    for key, message in messages.items():
        for other in (ragged_messages[key], reference.messages[key], naive.messages[key]):
            error = np.abs(message - np.asarray(other)).max()
            assert error <= TOLERANCES["message_absolute"], f"{key} is off by {error}"


@pytest.mark.parametrize("name", ["sequential", "mixture", "diamond"])
def test_messages_have_the_width_of_their_target(name: str, build_mixed: BuildTiny) -> None:
    built = build_mixed(SPECS[name])
    system = built.program.system
    widths = {name: system.backbone_of(name).facts.width for name in system.agents}
    assert len(set(widths.values())) == 3
    for key, message in built.reference(RECORDS[:1]).messages.items():
        source, target = key.partition("@")[0].split("->")
        assert message.shape == (1, system.agents[source].latent_steps, widths[target])


def test_a_record_that_lacks_an_entry_fails_alone(build_mixed: BuildTiny) -> None:
    system = build_mixed(SPLIT).system
    assert system.plan.fields == ("question", "facts[0]", "facts[1]")
    whole = {"question": "x", "facts": ["a", "b"]}
    short, text = {**whole, "facts": ["a"]}, {**whole, "facts": "a"}
    answer, few, none, other = system.run_batch([whole, short, text, whole])
    assert isinstance(answer, Answer)
    assert isinstance(other, Answer)
    assert answer.answer == other.answer
    assert "record '2' field 'facts' has 1 entry, and the prompts use facts[1]" in str(few)
    assert "record '3' field 'facts' is no list, and the prompts use facts[0]" in str(none)


def test_only_specialists_that_share_a_backbone_are_a_batch(build_mixed: BuildTiny) -> None:
    program = build_mixed(MIXTURE).program
    assert {op.agents for op in program.nodes().values() if isinstance(op, Prefill)} == {
        ("math", "code"),
        ("science",),
        ("summarizer",),
    }


@pytest.mark.parametrize("name", ["self_loop", "sequential"])
def test_all_forms_end_early_in_the_same_round(
    name: str, build_mixed: BuildTiny, tmp_path: Path
) -> None:
    text = SPECS[name].replace("rounds: 3", "rounds: 5")
    full = build_mixed(text).naive(RECORDS).messages
    links = {key.partition("@")[0] for key in full if key.endswith("@2")}
    cosines_B = torch.stack(
        [
            torch.cosine_similarity(full[f"{link}@2"], full[f"{link}@1"], dim=-1).mean(-1)
            for link in links
        ]
    ).amin(0)
    ordered = sorted(cosines_B.tolist())
    bound = (ordered[-1] + ordered[-2]) / 2  # one record is settled after round 2, two are not
    assert ordered[-1] - ordered[-2] > 1e-5
    built = build_mixed(
        text.replace("max_new_tokens: 10", f"max_new_tokens: 10, stop_when: {{cosine: {bound}}}")
    )
    single, messages = run_traced(built.system, tmp_path / "one", RECORDS, batch=1)
    ragged, ragged_messages = run_traced(
        built.system, tmp_path / "many", RECORDS, batch=len(RECORDS)
    )
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    rounds = [answer.rounds for answer in single]
    assert 3 in rounds
    assert len(set(rounds)) > 1
    assert rounds == [answer.rounds for answer in ragged] == reference.rounds == naive.rounds
    texts = [answer.answer for answer in single]
    assert texts == [answer.answer for answer in ragged]
    assert texts == reference.texts == naive.texts
    # Each record's row is its own: rounds that it did not run are not there.
    assert set(messages) == set(ragged_messages)
    for key, message in messages.items():
        round_ = int(key.partition("@")[2])
        ran = [round_ < ended or round_ == 5 for ended in rounds]
        for found in (message, ragged_messages[key]):
            assert np.isfinite(found).all(axis=(1, 2)).tolist() == ran, key
        error = np.nanmax(np.abs(message - ragged_messages[key]))
        assert error <= TOLERANCES["message_absolute"], f"{key} is off by {error}"


def test_no_early_end_without_the_messages_that_the_last_round_awaits(
    build_mixed: BuildTiny, tmp_path: Path
) -> None:
    built = build_mixed(AWAITED)
    answers, _ = run_traced(built.system, tmp_path, RECORDS, batch=len(RECORDS))
    reference, naive = built.reference(RECORDS), built.naive(RECORDS)
    assert [answer.rounds for answer in answers] == reference.rounds == naive.rounds == [6, 6, 6]
    assert [answer.answer for answer in answers] == reference.texts == naive.texts
