"""What the training tests train: a spec with its data, and topologies as training graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kit.files import lines
from kit.graphs import topology
from kit.systems import declare, random_links
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Link
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_runtime.formats.messages import MessageForm

# Two agents on tiny backbones; `write_case` writes it with data beside it.
SPEC = """\
recmas: 1
name: pair
rounds: 2
latent_steps: 3
backbones: {tiny: {source: llama}, other: {source: qwen2}}
agents:
  planner:
    backbone: other
    inner: {init: random}
    prompt:
      first: "{{ question }} Make a plan."
      then: "{{ question }} Seen: {{ latent.solver }} Better plan."
  solver:
    backbone: tiny
    inner: {init: random}
    prompt: "{{ question }} Use {{ latent.planner }} and answer."
links:
  planner -> solver: {}
  solver -> planner: {feedback: true}
answer: {agent: solver, max_new_tokens: 12}
build: {max_prompt_tokens: 384, max_batch: 4}
train:
  data: train.jsonl
  held_out: 0.25
  targets: {planner: plan, solver: solution}
  inner: {steps: 12, lr: 1e-3, batch_size: 4}
  outer: {steps: 8, lr: 1e-3, batch_size: 4}
  warmup_steps: 2
  eval_every: 4
  checkpoint_every: 3
"""


def record(number: int, **changes: object) -> dict[str, object]:
    """Return one sound record; a change to None removes the field."""
    a, b = number % 9 + 1, number % 7 + 2
    fields: dict[str, object] = {
        "id": f"r{number}",
        "question": f"What is {a} + {b}?",
        "plan": f"Add {a} and {b} in one step.",
        "solution": f"The sum of {a} and {b} is {a + b}.",
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def write_case(folder: Path, *, text: str = SPEC, data: str | None = None) -> Path:
    """Write the spec and, beside it, sixteen sound records or other data; return the spec."""
    path = folder / "spec.yaml"
    path.write_text(text)
    sound = lines(*(record(number) for number in range(16)))
    (folder / "train.jsonl").write_text(sound if data is None else data)
    return path


def changed(*edits: tuple[str, str]) -> str:
    """Return the spec with pieces of it replaced; each must stand in it once."""
    text = SPEC
    for piece, other in edits:
        assert text.count(piece) == 1, piece
        text = text.replace(piece, other)
    return text


STEPS = 4

TOPOLOGIES: dict[str, Callable[..., Graph]] = {
    "sequential": lambda **k: topology(
        "planner critic solver", "planner>critic critic>solver solver~>planner", rounds=3, **k
    ),
    "mixture": lambda **k: topology(
        "math code end", "math>end code>end end~>math end~>code", rounds=2, **k
    ),
    "self_loop": lambda **k: topology("solver", "solver~>solver", rounds=3, **k),
    "diamond": lambda **k: topology(
        "start left right end",
        "start>left start>right left>end right>end end~>start",
        rounds=2,
        **k,
    ),
    "interlocked": lambda **k: topology("a b c d", "a>b b>c c~>a c>d d~>b", rounds=3, **k),
    "answers_in_the_middle": lambda **k: topology(
        "a b c", "a>b b>c c~>a", rounds=2, answer="b", **k
    ),
    "mute_agent": lambda **k: topology(
        "a b c", "a>b b>c a>c c~>a", rounds=2, steps_of={"a": 0}, **k
    ),
    "uneven": lambda **k: topology(
        "a b c", "a>b b>c a>c c~>a", rounds=2, steps_of={"a": 2, "b": 7}, **k
    ),
}

QUESTIONS = [
    ("What is 7 * 8?", "Seven times eight. It is 56, and that is the answer."),
    ("Anna has three plans. Which is the best one, and why is it the best of them all?", "None"),
    ("The rest?", "An ending and another one in the plan."),
]


def examples(graph: Graph) -> list[TrainExample]:
    """Return records of very different lengths with a target of its own for every agent.

    One target is shorter than the latent steps.
    """
    return [
        TrainExample(
            id=str(number),
            index=number,
            fields={"question": question},
            targets={agent: f"{text} ({agent})"[i:] for i, agent in enumerate(graph.system.agents)}
            if len(text) > 4
            else dict.fromkeys(graph.system.agents, text[:2]),
        )
        for number, (question, text) in enumerate(QUESTIONS)
    ]


def on_one(name: str, backbone: TorchBackbone, **changes: object) -> Graph:
    """Return a topology whose agents all have one backbone."""
    return TOPOLOGIES[name](**{"steps": STEPS, "backbones": [declare("tiny", backbone)], **changes})


def carrying(graph: Graph, forms: Mapping[str, MessageForm]) -> Graph:
    """Return a topology whose links of these ids carry something else."""

    def changed_link(link: Link) -> Link:
        form = forms.get(link.id, link.form)
        return replace(link, form=form, weights=link.weights if form.has_vectors else None)

    links = {link_id: changed_link(link) for link_id, link in graph.system.links.items()}
    edges = tuple(replace(edge, op=links[edge.op.id]) for edge in graph.edges())
    return graph.replaced(system=replace(graph.system, links=links), edges=edges)


def changed_agents(graph: Graph, **changes: object) -> Graph:
    """Return a topology with something changed in every agent."""
    agents = {name: replace(agent, **changes) for name, agent in graph.system.agents.items()}
    return graph.replaced(system=replace(graph.system, agents=agents), nodes=agents)


def in_float64(backbone: TorchBackbone) -> TorchBackbone:
    """Return a copy of a backbone in float64, norms included: transformers has them in float32."""
    model = copy.deepcopy(backbone.model).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            is_gemma = "Gemma" in type(module).__name__
            eps = module.eps if is_gemma else module.variance_epsilon
            scale = module.weight + 1 if is_gemma else module.weight
            module.forward = partial(_rms_norm, scale=scale.detach(), eps=eps)
    return replace(backbone, model=model)


def _rms_norm(x: Tensor, *, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def training_graph(
    graph: Graph,
    backbones: Mapping[str, TorchBackbone],
    links: Mapping[str, nn.Module] | None = None,
    *,
    program: Graph | None = None,
    **options: object,
) -> TrainingGraph:
    """Return the training graph of a topology's whole pipeline, on links drawn at random."""
    return TrainingGraph(
        run_pipeline(graph) if program is None else program,
        backbones=backbones,
        links=random_links(graph) if links is None else links,
        **{"mode": "teacher_forced", **options},  # type: ignore[arg-type]
    )
