"""The outer stage: cross-entropy on the answer's text, through every link, agent and round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

import torch
from torch import nn

from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import Loss, TrainingGraph
from recmas_compiler.lowering.training_graph.latents import Control
from recmas_compiler.training.loop.distributed import World
from recmas_runtime.core.progress import Advance

# What the answer agent's slots hold in the last round, by the name that figures have.
CONTROLS: Final[Mapping[str, Control]] = {
    "latent": "none",
    "null": "null",
    "shuffled": "shuffled",
    "mean": "mean",
}
# With fewer records in a batch nothing can be shuffled, and a mean is the message itself.
_FEWEST: Final = 2


@dataclass(eq=False)
class OuterTask:
    """Trains all links of a graph together.

    Attributes:
        links: What learns, by link id; the graph's other links stay as they are.
        batch_size: Records of a measurement's batch.
    """

    graph: TrainingGraph
    links: Mapping[str, nn.Module]
    _: KW_ONLY
    train: Sequence[TrainExample]
    held_out: Sequence[TrainExample]
    batch_size: int

    def __post_init__(self) -> None:
        self.name = "the outer stage"
        self.num_examples = len(self.train)

    def loss(self, places: Sequence[int]) -> Loss:
        """Return the loss of the records at these places."""
        batch = self.graph.prepare([self.train[place] for place in places])
        loss: Loss = self.graph(batch, watch=True)
        return loss

    @torch.no_grad()
    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the held-out loss with generated thoughts, and under every control.

        Only what beats `shuffled` and `mean` is communication; the rest is a learned soft prompt.
        """
        if not self.held_out:
            return {}
        names = [
            name for name in CONTROLS if name in ("latent", "null") or len(self.held_out) >= _FEWEST
        ]
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=world.device)
        for places in world.share(_batches(len(self.held_out), self.batch_size)):
            batch = self.graph.prepare([self.held_out[place] for place in places])
            # A gold text's hidden states carry the answer: thoughts are always generated here.
            controls = [CONTROLS[name] for name in names]
            found = self.graph.compare(batch, controls=controls, mode="rollout")
            for row, control in enumerate(controls):
                sums[row, 0] += found[control].total.double()
                sums[row, 1] += found[control].tokens
        world.add_up(sums)
        return {name: float(sums[row, 0] / sums[row, 1]) for row, name in enumerate(names)}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return the gradient norm at each link's output by round, of this process's records."""
        norms = self.graph.round_gradients()
        return {
            "round_grad_norm": {
                f"{link_id}@{round_}": norm / tokens for (link_id, round_), norm in norms.items()
            }
        }


@torch.no_grad()
def exact_answers(
    graph: TrainingGraph, examples: Sequence[TrainExample], *, batch_size: int
) -> dict[str, list[bool]]:
    """Tell, by control, whether greedy decoding would write each record's target.

    Thoughts are generated, as in a running system.
    """
    found: dict[str, list[bool]] = {name: [] for name in CONTROLS}
    for places in _batches(len(examples), batch_size):
        batch = graph.prepare([examples[place] for place in places])
        losses = graph.compare(batch, controls=list(CONTROLS.values()), mode="rollout")
        for name, control in CONTROLS.items():
            found[name] += losses[control].per_record_exact.tolist()
    return found


@torch.no_grad()
def record_losses(
    graph: TrainingGraph,
    examples: Sequence[TrainExample],
    *,
    batch_size: int,
    advance: Advance = lambda num_units=1, *, note="": None,
) -> list[dict[str, Any]]:
    """Return id, mean loss and number of tokens of every record, in the spec's own mode."""
    found: list[dict[str, Any]] = []
    for first in range(0, len(examples), batch_size):
        some = examples[first : first + batch_size]
        loss: Loss = graph(graph.prepare(some))
        for example, total, tokens in zip(
            some, loss.per_record_sum.tolist(), loss.per_record_tokens.tolist(), strict=True
        ):
            found.append({"id": example.id, "loss": total / tokens, "tokens": int(tokens)})
        advance(len(some))
    return found


def _batches(num_examples: int, batch_size: int) -> list[list[int]]:
    """Return places in batches, none of a single record unless there is only one."""
    size = max(batch_size, _FEWEST)
    batches = [
        list(range(first, min(first + size, num_examples)))
        for first in range(0, num_examples, size)
    ]
    if len(batches) > 1 and len(batches[-1]) < _FEWEST:
        single = batches.pop()
        batches[-1] += single
    return batches
