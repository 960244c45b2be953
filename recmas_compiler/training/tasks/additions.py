"""What the outer stage does besides the answer's cross-entropy, as `train.outer` asks for it.

Everything depends on the settings, the seed and the step alone, so a run that is gone on with does
the same, and so do several processes or pieces of a batch.

Shape legend: N vectors of all messages, E width of a link's target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from recmas_compiler.links.modules import LinkModule
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import Loss, TrainingGraph
from recmas_compiler.lowering.training_graph.objective import Objective
from recmas_compiler.spec.schema.train import MixSection, OuterStageSection
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import AtStep
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.running.controls import exchange, sender_inputs

# The part of the newest mean in the running one; in the first steps it is larger.
_NEWEST: Final = 0.1
_SEEDS: Final = 2**32


class Additions:
    """The loss with everything that was added, and what follows a step.

    Args:
        learning: The links that learn, by id.
        train: All training records.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        stage: OuterStageSection,
        *,
        learning: Mapping[str, nn.Module],
        train: Sequence[TrainExample],
        seed: int,
    ) -> None:
        self._graph = graph
        self._stage = stage
        self._objective = Objective(graph, stage)
        self._train = train
        self._seed = seed
        self._figures: dict[str, Tensor] = {}
        self._share = 0.0
        self._partners: tuple[int, dict[int, int]] = (-1, {})
        self._centered = {
            link_id: offset
            for link_id in graph.plan.links
            if stage.center and link_id in learning
            if (offset := _offset(learning[link_id])) is not None
        }
        self._sums = {
            link_id: offset.new_zeros(len(offset) + 1, dtype=torch.float64)
            for link_id, offset in self._centered.items()
        }

    def loss(self, places: Sequence[int], at: AtStep) -> Loss:
        """Return the loss of the records at these places, some of the step's."""
        self._share = share_at(self._stage.mix, at)
        partners = self._partners_at(at) if self._stage.mismatch is not None else {}
        whole = list(places)
        # Others of the step send their messages only.
        whole += [
            p
            for p in dict.fromkeys(partners.get(place, place) for place in places)
            if p not in places
        ]
        batch = self._graph.prepare([self._train[p] for p in whole], num_counted=len(places))
        loss = self._objective(
            batch,
            partners=[whole.index(partners[place]) for place in places]
            + list(range(len(places), len(whole)))
            if partners
            else None,
            share=self._share,
            note=self._note if self._centered else None,
        )
        for name, part in loss.parts.items():
            self._figures[name] = self._figures.get(name, torch.zeros_like(part)) + part
        return loss

    @torch.no_grad()
    def finish_step(self, at: AtStep, world: World) -> None:
        """Subtract the messages' mean from the last bias of every link that is centred."""
        newest = max(_NEWEST, 1 / (at.step + 1))
        for link_id, offset in self._centered.items():
            sums = world.add_up(self._sums[link_id])
            if sums[-1] > 0:
                offset.sub_(newest * (sums[:-1] / sums[-1]).to(offset.dtype))
            self._sums[link_id] = torch.zeros_like(sums)

    def figures(self, tokens: float) -> dict[str, Any]:
        """Return the step's means of what the loss is made of, of this process's records."""
        found = {name: float(part) / tokens for name, part in self._figures.items()}
        self._figures = {}
        share = {} if self._stage.mix is None else {"mix": self._share}
        return {"parts": {**found, **share}}

    def _partners_at(self, at: AtStep) -> dict[int, int]:
        """Return for each record of a step one with another answer; empty if all agree."""
        if self._partners[0] != at.step:
            self._partners = at.step, self._exchanged(at)
        return self._partners[1]

    def _exchanged(self, at: AtStep) -> dict[int, int]:
        answer, plan = self._graph.plan.answer_agent, self._graph.plan
        places = list(dict.fromkeys(at.places))
        examples = [self._train[place] for place in places]
        try:
            found = exchange(
                [(example.targets[answer],) for example in examples],
                [sender_inputs(plan, {**e.fields, "id": e.id}) for e in examples],
                seed=self._seed * _SEEDS + at.step,
            )
        except RecmasError:  # one record, or one answer
            return {}
        return dict(zip(places, (places[sender] for sender in found.senders), strict=True))

    def _note(self, link_id: str, messages_NE: Tensor) -> None:
        if link_id in self._sums and len(messages_NE):
            sums = self._sums[link_id]
            sums[:-1] += messages_NE.detach().double().sum(0)
            sums[-1] += len(messages_NE)


def share_at(mix: MixSection | None, at: AtStep) -> float:
    """Return the part of messages that is text in a step."""
    if mix is None:
        return 0.0
    return mix.start + (mix.end - mix.start) * at.step / max(1, at.steps - 1)


def _offset(link: nn.Module) -> nn.Parameter | None:
    assert isinstance(link, LinkModule), "only links have an offset"
    return link.offset
