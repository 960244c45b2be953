"""From small specs to the printed program: what a user writes, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Prefill, Think
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.passes.pass_base import VerifyPasses
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec

SEQUENTIAL = """
recmas: 1
name: sequential
rounds: 2
latent_steps: 4
backbones:
  small: {source: small}
pattern: {sequential: [planner, critic, solver]}
build: {max_prompt_tokens: 64}
answer: {agent: solver, max_new_tokens: 32}
"""

DIAMOND = """
recmas: 1
name: diamond
rounds: 2
latent_steps: 8
backbones:
  small: {source: small}
  twin: {source: ./small}
  wide: {source: wide}
agents:
  start:
    backbone: wide
    latent_steps: 2
    prompt:
      first: "{{ question }} Begin."
      then: "{{ question }} So far: {{ latent.end }}"
  left: {backbone: small, prompt: "Left of {{ latent.start }}, {{ question }}"}
  right: {backbone: twin, system: Be right., prompt: "{{ question }} {{ latent.start }} Right?"}
  end: {backbone: small, prompt: "{{ question }} {{ latent.left }} or {{ latent.right }}?"}
links:
  start -> left: {}
  start -> right: {kind: ln_residual, init: random}
  left -> end: {}
  right -> end: {}
  end -> start: {feedback: true}
answer: {agent: end, temperature: 0.7, seed: 3}
"""

SELF_LOOP = """
recmas: 1
name: self-loop
rounds: 3
latent_steps: 2
backbones:
  small: {source: small}
agents:
  thinker:
    backbone: small
    prompt: {first: "Think: {{ question }}", then: "Think: {{ question }} {{ latent.thinker }}"}
links:
  thinker -> thinker: {feedback: true}
answer: {agent: thinker}
"""

# Two of three specialists share a backbone; the early end and the tools are part of the print.
MIXTURE = """
recmas: 1
name: mixture
rounds: 4
latent_steps: 4
pattern:
  mixture: {specialists: [math, code, science], summarizer: summarizer}
  task: math
backbones:
  small: {source: small}
  wide: {source: wide}
agents:
  math: {backbone: small}
  code: {backbone: small}
  science: {backbone: wide}
  summarizer: {backbone: wide}
answer:
  max_new_tokens: 32
  stop_when: {cosine: 0.99}
  tools: {search: {corpus: texts}, python: {}, ask: true, functions: [lookup], timeout_s: 5}
"""

DELIBERATION = """
recmas: 1
name: deliberation
rounds: 2
latent_steps: 4
pattern: {deliberation: {reflector: reflector, caller: caller}, task: choice}
backbones:
  small: {source: small}
answer: {max_new_tokens: 32, tools: {search: {backend: tavily, top_k: 1}}}
"""

SPECS = {"sequential": SEQUENTIAL, "diamond": DIAMOND, "self_loop": SELF_LOOP}
SPECS |= {"mixture": MIXTURE, "deliberation": DELIBERATION}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two backbone folders that hold only a config: all that the IR needs; and a corpus."""
    (tmp_path / "texts").mkdir()
    for name, width in {"small": 32, "wide": 48}.items():
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
            "max_position_embeddings": 2048,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("name", SPECS)
def test_program(name: str, folder: Path, golden: Callable[..., None]) -> None:
    spec = parse_spec(SPECS[name], file="spec.yaml", base_dir=folder)
    program = run_pipeline(build_topology(spec), instruments=(VerifyPasses(),))
    golden(print_graph(program))


def test_specialists_that_share_a_backbone_are_one_batch_in_every_round(folder: Path) -> None:
    spec = parse_spec(MIXTURE, base_dir=folder)
    program = run_pipeline(build_topology(spec))
    batches = {
        kind: [op.agents for op in program.nodes().values() if isinstance(op, kind)]
        for kind in (Prefill, Think)
    }
    assert batches[Prefill].count(("math", "code")) == 4
    assert batches[Prefill].count(("science",)) == 4
    assert batches[Think].count(("math", "code")) == 4
    assert {agents for found in batches.values() for agents in found} == {
        ("math", "code"),
        ("science",),
        ("summarizer",),
    }
    together = spec_on_one_backbone(folder)
    for kind in (Prefill, Think):
        found = [op.agents for op in together.nodes().values() if isinstance(op, kind)]
        assert found.count(("math", "code", "science")) == 4
        assert not any(len(agents) == 1 and agents != ("summarizer",) for agents in found)


def spec_on_one_backbone(folder: Path) -> Graph:
    text = MIXTURE.replace("science: {backbone: wide}", "science: {backbone: small}")
    return run_pipeline(build_topology(parse_spec(text, base_dir=folder)))
