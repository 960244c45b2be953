"""Systems with agents behind an API: the program, what is said of it, and its plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from recmas_compiler.analysis.explain import explain
from recmas_compiler.analysis.memory import memory_plan
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.lowering.plan import build_plan, live_remotes
from recmas_compiler.lowering.reference import to_torch
from recmas_compiler.passes.pass_base import RecordPasses, VerifyPasses
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.plan import AskStep

PLANNER = """
recmas: 1
name: remote-planner
rounds: 2
latent_steps: 4
backbones:
  far: {source: 'openai:big', base_url: 'http://127.0.0.1:9/v1', api_key_env: FAR_KEY}
  near: {source: 'builtin:smollm2-135m-instruct'}
agents:
  planner:
    backbone: far
    prompt: {first: "P {{ question }}", then: "P {{ question }} {{ latent.solver }}"}
  critic: {backbone: near, prompt: "C {{ question }} {{ latent.planner }}"}
  solver: {backbone: near, prompt: "S {{ question }} {{ latent.planner }} {{ latent.critic }}"}
links:
  planner -> critic: {carries: text}
  planner -> solver: {carries: text}
  critic -> solver: {}
  solver -> planner: {carries: text, feedback: true}
answer: {agent: solver}
"""

# Local readers, a remote pair that is asked side by side, and a remote answer.
ANSWER = """
recmas: 1
name: remote-answer
latent_steps: 4
backbones:
  far: {source: 'openai:big', base_url: 'http://127.0.0.1:9/v1'}
  other: {source: 'openai:small', base_url: 'http://127.0.0.1:9/v1'}
  near: {source: 'builtin:smollm2-135m-instruct'}
agents:
  reader: {backbone: near, prompt: "R {{ question }}"}
  left: {backbone: far, prompt: "L {{ question }} {{ latent.reader }}"}
  right: {backbone: other, prompt: "R {{ question }} {{ latent.reader }}"}
  solver:
    backbone: far
    prompt: "S {{ question }} {{ latent.left }} {{ latent.right }}"
links:
  reader -> left: {carries: text}
  reader -> right: {carries: text}
  left -> solver: {carries: text}
  right -> solver: {carries: text}
answer: {agent: solver}
"""


def program(text: str) -> Graph:
    return run_pipeline(build_topology(parse_spec(text)), instruments=(VerifyPasses(),))


@pytest.mark.parametrize("text", [PLANNER, ANSWER], ids=["planner", "answer"])
def test_program(text: str, golden: Callable[..., None]) -> None:
    golden(print_graph(program(text)).partition("prompts\n")[0], "-tables")
    golden(print_graph(program(text)).partition("program\n")[2], "-steps")


def test_explain_says_who_is_asked_where(golden: Callable[..., None]) -> None:
    topology, passes = build_topology(parse_spec(PLANNER)), RecordPasses()
    run_pipeline(topology, instruments=(passes,))
    golden(explain(topology, passes.records))


def test_memory_counts_what_is_here() -> None:
    memory = memory_plan(program(PLANNER))
    assert [backbone.name for backbone in memory.backbones] == ["near"]
    assert memory.remotes == {"planner": "openai:big at http://127.0.0.1:9/v1"}
    assert "none here" in str(memory)


def test_plans_ask_and_end_with_an_answer() -> None:
    planner, answer = program(PLANNER), program(ANSWER)
    assert [step.op for step in build_plan(planner).steps[:3]] == ["ask", "send", "send"]
    assert build_plan(planner).answer_step.op == "decode"
    assert set(build_plan(planner).caches) == {"critic", "solver"}
    asks = [step for step in build_plan(answer).steps if isinstance(step, AskStep)]
    assert [(step.agents, step.max_new_tokens, step.greedy) for step in asks] == [
        (("left", "right"), 64, True),
        (("solver",), None, False),
    ]
    assert build_plan(answer).answer_step == asks[-1]
    assert live_remotes(answer) == ("far", "other")


def test_there_is_no_reference_in_torch() -> None:
    with pytest.raises(RecmasError, match=r"RM129.*`planner` runs on a model behind an API"):
        to_torch(program(PLANNER))
