"""Systems in which every kind of message is handed over, and records that they answer.

Backbones are in folders named after their family; `state` has layers that keep states.
"""

from __future__ import annotations

from kit.specs import ALL, HEAD

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
