"""How gradients fare from round to round, and how a training step grows with the system.

    python benchmarks/training_growth.py OUT [--source BACKBONE] [--rounds 3] [--records 4]

**Gradients.** A relay of two agents runs some rounds by rollout, all on one backbone. Three
hand-overs take a thought h (a hidden state after the final norm) to the next input embedding, and
to the message; between agents on one backbone the outer link is the identity:

- `links`: the aligned inner link, as training starts with;
- `soft text`: the mean embedding under the decoder's distribution, E^T softmax(W h);
- `text`: the embedding of the likeliest token, as agents that write text hand it over. That has no
  gradient at all, so backward takes the one of `soft text` (straight-through).

For every agent and round: the norm of the loss's gradient at its thoughts (all that it could learn
from this round), and the gain, which is that norm by the norm at the hand-over's output: what the
hand-over itself lets through. A thought acts through its hand-over only, so the gain is exact. What
is *not* claimed: that texts have such gradients. They have none; `text` is the best stand-in.

**Step time.** Forward and backward of one batch, the median of some, while agents, rounds or latent
steps grow and the other two stay; the links' weights do not matter for it. The exponent p is that
of t = a + b n^p.

Writes OUT/growth.json and growth.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from growth import fit
from relay_specs import SMOL, relay_spec, write_codes
from torch import Tensor, nn

import recmas_compiler as rc
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.links.modules import make_link, randomize
from recmas_compiler.lowering.materialize import materialize_links
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import TrainingGraph
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.ids import inner_link_id

# What stays while something else grows.
USUAL = {"agents": 2, "rounds": 2, "latent_steps": 8}
GROWING = {"agents": (2, 3, 4, 5), "rounds": (1, 2, 3, 4), "latent_steps": (2, 4, 8, 16, 32)}


class TextHandOver(nn.Module):
    """A thought becomes the embedding of a token, by way of the decoder.

    Args:
        backbone: Its head and its embeddings.
        hard: The likeliest token forward, backward as if soft; else the mean over all tokens.
    """

    def __init__(self, backbone: TorchBackbone, *, hard: bool) -> None:
        super().__init__()
        ids = torch.arange(backbone.facts.vocab_size)
        self.table_VD = nn.Parameter(backbone.embed(ids).detach().float(), requires_grad=False)
        self._logits = backbone.logits
        self._hard = hard

    def forward(self, h: Tensor) -> Tensor:
        odds = self._logits(h).softmax(-1)
        soft = odds @ self.table_VD
        if not self._hard:
            return soft
        return soft + (self.table_VD[odds.argmax(-1)] - soft).detach()


class GradientWatch:
    """Adds up squared gradients at what inner links read and give, by agent and round.

    Args:
        graph: To train by rollout. Its inner links run once per latent step, round after round.
    """

    def __init__(self, graph: TrainingGraph) -> None:
        self.read: dict[tuple[str, int], float] = defaultdict(float)
        self.given: dict[tuple[str, int], float] = defaultdict(float)
        rounds: dict[str, list[int]] = defaultdict(list)
        for site in graph.thinking:
            rounds[site.agent].append(site.round)
        for agent, own in rounds.items():
            steps = graph.system.agents[agent].latent_steps
            self._watch(graph.link(inner_link_id(agent)), agent, own, steps)

    def _watch(self, link: nn.Module, agent: str, rounds: Sequence[int], steps: int) -> None:
        calls = 0

        def before(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            (thoughts,) = arguments
            if not thoughts.requires_grad:  # nothing before it learns, but it is asked about
                thoughts = thoughts.detach().requires_grad_()
            self._add(thoughts, self.read, (agent, rounds[calls // steps]))
            return (thoughts,)

        def after(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            nonlocal calls
            self._add(output, self.given, (agent, rounds[calls // steps]))
            calls += 1

        link.register_forward_pre_hook(before)
        link.register_forward_hook(after)

    @staticmethod
    def _add(tensor: Tensor, sums: dict[tuple[str, int], float], key: tuple[str, int]) -> None:
        def add(gradient: Tensor) -> None:
            sums[key] += float(gradient.detach().double().square().sum())

        tensor.register_hook(add)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default=SMOL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latent-steps", type=int, default=4)
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    records = read_codes(out / "codes.jsonl", arguments.records)
    program = compiled(
        out,
        arguments.source,
        agents=2,
        rounds=arguments.rounds,
        latent_steps=arguments.latent_steps,
    )
    backbones = load_backbones(program, progress=Silent())
    found: dict[str, Any] = {"source": arguments.source, "records": arguments.records}
    found["gradients"] = gradients(program, backbones, records)
    found["step_seconds"] = {
        what: {
            number: step_seconds(
                compiled(out, arguments.source, **{**USUAL, what: number}),
                backbones,
                records,
                repeats=arguments.repeats,
            )
            for number in numbers
        }
        for what, numbers in GROWING.items()
    }
    (out / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "growth.md").write_text(report(found) + "\n")
    print(report(found))


def read_codes(path: Path, number: int) -> list[TrainExample]:
    write_codes(path, digits=4, records=number, seed=0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        TrainExample(id=row["id"], index=i, fields=row, targets={"speaker": row["code"]})
        for i, row in enumerate(rows)
    ]


def compiled(out: Path, source: str, *, agents: int, rounds: int, latent_steps: int) -> Graph:
    """Return the program of a relay."""
    train = {
        "data": "codes.jsonl", "targets": {"speaker": "code"}, "outer": {"mode": "rollout"},
    }  # fmt: skip
    path = out / "spec.yaml"
    text = relay_spec(
        agents=agents, rounds=rounds, latent_steps=latent_steps, sources=(source,), train=train
    )
    path.write_text(text)
    return rc.compile(rc.load_spec(path)).graph


def gradients(
    program: Graph, backbones: Mapping[str, TorchBackbone], records: Sequence[TrainExample]
) -> dict[str, Any]:
    """Return, by hand-over and by agent and round: gradient norm at thoughts, and gain."""
    found = {}
    for name in ("links", "soft text", "text"):
        made = materialize_links(program, backbones, progress=Silent())
        links: dict[str, nn.Module] = {link_id: link.module for link_id, link in made.items()}
        if name != "links":
            for agent in program.system.agents:
                backbone = backbones[program.system.backbone_of(agent).name]
                links[inner_link_id(agent)] = TextHandOver(backbone, hard=name == "text")
        graph = TrainingGraph(program, backbones=backbones, links=links, mode="rollout")
        watch = GradientWatch(graph)
        loss = graph(graph.prepare(records))
        loss.mean.backward()
        found[name] = {
            "loss": loss.mean.item(),
            "rounds": {
                f"{agent}@{round_}": {
                    "norm": square**0.5,
                    "gain": (square / watch.given[agent, round_]) ** 0.5,
                }
                for (agent, round_), square in sorted(watch.read.items(), key=lambda e: e[0][1])
            },
        }
    return found


def step_seconds(
    program: Graph,
    backbones: Mapping[str, TorchBackbone],
    records: Sequence[TrainExample],
    *,
    repeats: int,
) -> float:
    """Return the median time of forward and backward, after one that does not count."""
    system = program.system
    forms = {inner_link_id(name): ("inner", a.inner) for name, a in system.agents.items()}
    forms |= {link_id: ("outer", link.weights) for link_id, link in system.links.items()}
    links = {
        link_id: make_link(weights.kind, role, weights.in_dim, weights.out_dim)
        for link_id, (role, weights) in forms.items()
    }
    for link_id, link in links.items():
        randomize(link, link_id=link_id)
    graph = TrainingGraph(program, backbones=backbones, links=links, mode="rollout")
    batch = graph.prepare(records)
    times = []
    for _ in range(repeats + 1):
        graph.zero_grad()
        started = time.perf_counter()
        graph(batch).mean.backward()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def report(found: Mapping[str, Any]) -> str:
    kinds = found["gradients"]
    lines = [f"# Gradients and step times, {found['source']}, {found['records']} records", ""]
    names = " | ".join(f"{name}: norm | gain" for name in kinds)
    lines += [f"| agent@round | {names} |", "|---" * (1 + 2 * len(kinds)) + "|"]
    for place in next(iter(kinds.values()))["rounds"]:
        cells = (kind["rounds"][place] for kind in kinds.values())
        shown = " | ".join(f"{cell['norm']:.2e} | {cell['gain']:.3f}" for cell in cells)
        lines.append(f"| {place} | {shown} |")
    losses = ", ".join(f"{name} {kind['loss']:.3f}" for name, kind in kinds.items())
    lines += ["", f"Loss: {losses}.", ""]
    usual = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in USUAL.items())
    lines += [f"Step times around {usual}:", ""]
    lines += ["| what grows | s/step | exponent |", "|---|---|---|"]
    for what, times in found["step_seconds"].items():
        shown = ", ".join(f"{number}: {seconds:.3f}" for number, seconds in times.items())
        *_, exponent = fit([int(number) for number in times], list(times.values()))
        lines.append(f"| {what.replace('_', ' ')} | {shown} | {exponent:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
