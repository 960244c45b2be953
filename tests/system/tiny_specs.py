"""Specs of every shape, on tiny backbones."""

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
