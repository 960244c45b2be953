"""The specs of the tests: YAML texts of every shape, and backbone folders that hold only a config.

No torch is needed. `SPECS` and what follows are on tiny backbones (`kit.models`) in folders named
after their family; `kit.bundles` builds them.
"""

from __future__ import annotations

import json
from pathlib import Path

from recmas_runtime.core.errors import Problem

# What tests of the language vary, on a backbone that is only declared.
PAIR = """\
recmas: 1
name: demo
rounds: 2
backbones:
  small: {source: ./small}
agents:
  planner:
    backbone: small
    prompt:
      first: Plan {{ question }}
      then: Plan {{ question }} again {{ latent.solver }}
  solver:
    backbone: small
    prompt: Solve {{ question }} with {{ latent.planner }}
links:
  planner -> solver: {}
  solver -> planner: {feedback: true}
answer: {agent: solver}
"""

CHAIN = """\
recmas: 1
name: chain
rounds: 3
pattern: {sequential: [planner, critic, solver]}
backbones:
  small: {source: ./small}
"""

# Of systems over several families: the beginning, and the backbones that `write_mixed_backbones`
# makes.
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

ANSWER = """
answer: {agent: solver, max_new_tokens: 12}
build: {max_prompt_tokens: 384, max_batch: 8}
"""

SEQUENTIAL = f"""
recmas: 1
name: sequential
rounds: 3
latent_steps: 4
backbones: {{tiny: {{source: llama}}}}
agents:
  planner:
    backbone: tiny
    system: Plan well.
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} Make a plan."
      then: "{{{{ question }}}} Seen: {{{{ latent.solver }}}} Better plan."
  critic:
    backbone: tiny
    inner: {{init: random}}
    prompt: "{{{{ question }}}} Judge {{{{ latent.planner }}}}."
  solver:
    backbone: tiny
    inner: {{init: random}}
    prompt: "{{{{ question }}}} Use {{{{ latent.critic }}}} and answer."
links:
  planner -> critic: {{init: random}}
  critic -> solver: {{init: random}}
  solver -> planner: {{init: random, feedback: true}}
{ANSWER}
"""

MIXTURE = f"""
recmas: 1
name: mixture
rounds: 2
latent_steps: 3
backbones: {{tiny: {{source: llama}}}}
agents:
  math:
    backbone: tiny
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} Count."
      then: "{{{{ question }}}} Count again: {{{{ latent.solver }}}}"
  code:
    backbone: tiny
    inner: {{kind: ln_residual, init: random}}
    prompt:
      first: "Think of a program for this: {{{{ question }}}}"
      then: "Think of a program for this: {{{{ question }}}} {{{{ latent.solver }}}}"
  logic:
    backbone: tiny
    inner: {{kind: residual, init: random}}
    prompt: "Reason. {{{{ question }}}}"
  solver:
    backbone: tiny
    inner: {{init: random}}
    prompt: "{{{{ latent.math }}}} {{{{ latent.code }}}} {{{{ latent.logic }}}} {{{{ question }}}}"
links:
  math -> solver: {{init: random}}
  code -> solver: {{kind: ln_residual, init: random}}
  logic -> solver: {{kind: residual, init: random}}
  solver -> math: {{init: random, feedback: true}}
  solver -> code: {{init: random, feedback: true}}
{ANSWER}
"""

LOOP = f"""
recmas: 1
name: loop
rounds: 4
latent_steps: 5
backbones: {{tiny: {{source: qwen3}}}}
agents:
  solver:
    backbone: tiny
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}}"
      then: "{{{{ question }}}} So far: {{{{ latent.solver }}}}"
links:
  solver -> solver: {{init: random, feedback: true}}
{ANSWER}
"""

# Three families, two widths each way, a diamond, unequal latent steps and an agent without any.
HETEROGENEOUS = f"""
recmas: 1
name: heterogeneous
rounds: 2
latent_steps: 3
backbones:
  small: {{source: llama}}
  other: {{source: qwen3}}
  third: {{source: gemma3}}
agents:
  reader:
    backbone: small
    inner: {{init: random}}
    prompt:
      first: "Read: {{{{ question }}}}"
      then: "Read: {{{{ question }}}} {{{{ latent.solver }}}}"
  left:
    backbone: other
    latent_steps: 5
    inner: {{init: random}}
    prompt: "Left {{{{ latent.reader }}}} of {{{{ question }}}}"
  right:
    backbone: third
    latent_steps: 2
    inner: {{kind: ln_residual, init: random}}
    prompt: "Right {{{{ latent.reader }}}} of {{{{ question }}}}"
  mute:
    backbone: third
    latent_steps: 0
    inner: {{init: random}}
    prompt: "Nothing about {{{{ question }}}}"
  solver:
    backbone: third
    inner: {{init: random}}
    prompt: >-
      {{{{ question }}}} {{{{ latent.left }}}}{{{{ latent.right }}}}{{{{ latent.mute }}}} Answer.
links:
  reader -> left: {{init: random}}
  reader -> right: {{init: random}}
  left -> solver: {{init: random}}
  right -> solver: {{init: random}}
  mute -> solver: {{init: random}}
  solver -> reader: {{init: random, feedback: true}}
{ANSWER}
"""

# Two loops that share an agent, and a feedback link that goes with the order of the round.
INTERLOCKED = f"""
recmas: 1
name: interlocked
rounds: 3
latent_steps: 2
backbones: {{tiny: {{source: gemma3}}}}
agents:
  first:
    backbone: tiny
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} Begin."
      then: "{{{{ question }}}} {{{{ latent.middle }}}} go on {{{{ latent.solver }}}}"
  middle:
    backbone: tiny
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.first }}}}"
      then: "{{{{ question }}}} {{{{ latent.first }}}} {{{{ latent.solver }}}}"
  solver:
    backbone: tiny
    inner: {{init: random}}
    prompt:
      first: "{{{{ question }}}} {{{{ latent.middle }}}}"
      then: "{{{{ question }}}} {{{{ latent.middle }}}} earlier {{{{ latent.first }}}}"
links:
  first -> middle: {{init: random}}
  middle -> solver: {{init: random}}
  middle -> first: {{init: random, feedback: true}}
  solver -> first: {{init: random, feedback: true}}
  solver -> middle: {{init: random, feedback: true}}
  first -> solver: {{init: random, feedback: true}}
{ANSWER}
"""

SPECS = {
    "sequential": SEQUENTIAL,
    "mixture": MIXTURE,
    "loop": LOOP,
    "heterogeneous": HETEROGENEOUS,
    "interlocked": INTERLOCKED,
}

_ON_THREE_BACKBONES = """
recmas: 1
name: mixed
rounds: 2
latent_steps: 3
backbones:
  small: {%s}
  other: {%s}
  third: {%s}
agents:
  reader:
    backbone: small
    inner: {init: random}
    prompt:
      first: "Read: {{ question }}"
      then: "Read: {{ question }} {{ latent.solver }}"
  judge:
    backbone: other
    inner: {init: random}
    prompt: "Judge {{ latent.reader }} of {{ question }}"
  solver:
    backbone: third
    inner: {init: random}
    prompt: "{{ question }} {{ latent.judge }} Answer."
links:
  reader -> judge: {init: random}
  judge -> solver: {init: random}
  solver -> reader: {init: random, feedback: true}
answer: {agent: solver, max_new_tokens: 12}
build: {%s}
"""


def on_three_backbones(
    small: str, other: str, third: str, *, build: str = "max_prompt_tokens: 384, max_batch: 8"
) -> str:
    """Return a ring of three agents; arguments are what stands between a section's braces."""
    return _ON_THREE_BACKBONES % (small, other, third, build)


# Two names of one backbone beside another, links of every kind, a field that a spec declares.
TWINS = """
recmas: 1
name: pair
rounds: 2
latent_steps: 3
backbones:
  small: {source: models/small}
  twin: {source: models/small}
  other: {source: models/other}
agents:
  planner:
    backbone: small
    system: You are careful. Today is {{ day }}.
    prompt:
      first: "{{ question }} Plan."
      then: "{{ question }} Thought: {{ latent.solver }} Plan."
    inner: {kind: residual, init: random}
  critic:
    backbone: other
    prompt: "{{ question }} Plan: {{ latent.planner }}"
    inner: {kind: ln_residual, init: random}
  solver:
    backbone: twin
    prompt: "{{ question }} {{ hint }} Critic: {{ latent.critic }}"
    inner: {kind: projected, init: random}
links:
  planner -> critic: {kind: projected, init: random}
  critic -> solver: {kind: ln_residual, init: random}
  solver -> planner: {feedback: true, kind: residual, init: random}
answer: {agent: solver, max_new_tokens: 8}
build: {max_prompt_tokens: 96, max_batch: 4}
"""

# Two agents run as one batch, their inner links have different hidden widths, and the third agent
# is on a backbone of its own, so that there is more than one.
TRIO = """
recmas: 1
name: trio
rounds: 2
latent_steps: 5
backbones:
  small: {source: models/small}
  other: {source: models/other}
agents:
  one:
    backbone: small
    prompt: {first: "{{ question }}", then: "{{ question }} {{ latent.solver }}"}
    inner: {kind: residual, init: random}
  two:
    backbone: small
    prompt: "Plan. {{ question }}"
    inner: {kind: ln_residual, init: random}
  solver:
    backbone: other
    prompt: "{{ question }} {{ latent.one }} {{ latent.two }}"
    inner: {kind: projected, init: random}
links:
  one -> solver: {init: random}
  two -> solver: {init: random}
  solver -> one: {feedback: true, init: random}
answer: {agent: solver, max_new_tokens: 12}
build: {max_prompt_tokens: 120, max_batch: 3}
"""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def write_config(folder: Path, **changes: object) -> Path:
    """Write a folder with a Llama config, changed; a value of None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def at(problem: Problem) -> tuple[str, int | None, int | None]:
    """Return code, line and column."""
    return problem.code, problem.line, problem.column
