"""Specs that the tests vary, and backbone folders that hold nothing but a config."""

from __future__ import annotations

import json
from pathlib import Path

from recmas_runtime.core.errors import Problem

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
