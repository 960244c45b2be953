"""The answer agent on its own, to compare with: no messages, and its own backbone learns.

It is asked what the runtime's baseline `single` asks it, and learns from the same records in the
same order as links do.

Shape legend: N rows, S columns, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.ops import System
from recmas_compiler.lowering.training_graph.agent_calls import Row, pad_rows
from recmas_compiler.lowering.training_graph.calls import Call, CallWriter, TrainExample
from recmas_compiler.lowering.training_graph.loss import Loss, turn_loss, weighted_loss
from recmas_compiler.training.loop.distributed import World
from recmas_runtime.prompts.render import Tokens
from recmas_runtime.running.baselines import without_slots


class SingleAgentTask:
    """Trains weights of one backbone on one agent's prompts and targets.

    Args:
        writer: Renders the agent's prompt, which has no slots.
        agent: Its name.
        backbone: Whose weights learn.
        learning: What learns, by name.
        train: Records to learn from.
        held_out: Records to measure on.
        batch_size: Records of a measurement's batch.
        checkpointed: Compute calls again for their gradients instead of keeping them.
        compute: Element type of products; weights keep theirs.
    """

    def __init__(
        self,
        writer: CallWriter,
        agent: str,
        backbone: TorchBackbone,
        learning: Mapping[str, nn.Module],
        *,
        train: Sequence[TrainExample],
        held_out: Sequence[TrainExample],
        batch_size: int,
        checkpointed: bool,
        compute: torch.dtype,
    ) -> None:
        self.name = f"`{agent}` alone"
        self.links = learning
        self.num_examples = len(train)
        self._writer = writer
        self._agent = agent
        self._backbone = backbone
        self._train = train
        self._held_out = held_out
        self._batch_size = batch_size
        self._checkpointed = checkpointed
        self._compute = compute

    def loss(self, places: Sequence[int]) -> Loss:
        """Return the loss of the records at these places."""
        return self._loss([self._train[place] for place in places])

    @torch.no_grad()
    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the held-out loss."""
        if not self._held_out:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        batches = range(0, len(self._held_out), self._batch_size)
        for first in world.share(batches):
            loss = self._loss(self._held_out[first : first + self._batch_size])
            sums[0] += loss.total.double()
            sums[1] += loss.tokens
        total, tokens = world.add_up(sums).tolist()
        return {"alone": total / tokens}

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return nothing more: there are no rounds."""
        return {}

    def _loss(self, examples: Sequence[TrainExample]) -> Loss:
        calls = [self._writer.write(self._agent, "then", "turn", e) for e in examples]
        rows = [Row(pieces=(_ids(call),), num_wanted=call.num_target_tokens + 1) for call in calls]
        device = self._backbone.model.device
        reduced = self._compute != torch.float32
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=reduced):
            hidden_NSD = self._read(rows)
            turns_TD = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
            loss = turn_loss(self._backbone, turns_TD, calls, checkpointed=self._checkpointed)
        return weighted_loss(loss, last_round=1, earlier={})

    def _read(self, rows: Sequence[Row]) -> Tensor:
        device = self._backbone.model.device
        padded = pad_rows(
            rows, lambda ids: self._backbone.embed(ids.to(device)), multiple=1, always_mask=False
        )

        def run(embeds_NSD: Tensor) -> Tensor:
            hidden_NSD: Tensor = self._backbone.body(
                inputs_embeds=embeds_NSD,
                attention_mask=padded.mask_NS,
                position_ids=padded.positions_NS,
                use_cache=False,
            ).last_hidden_state
            return hidden_NSD

        if not self._checkpointed or not torch.is_grad_enabled():
            return run(padded.embeds_NSD)
        hidden_NSD: Tensor = checkpoint(
            run, padded.embeds_NSD, use_reentrant=False, preserve_rng_state=False
        )
        return hidden_NSD


def calls_without_slots(
    system: System, backbones: Mapping[str, TorchBackbone], agent: str
) -> CallWriter:
    """Return a writer of an agent's calls without messages, as the runtime's `single` asks it."""
    declared = system.agents[agent]
    alone = replace(declared, first=None, then=without_slots(declared.then))
    return CallWriter(replace(system, agents={**system.agents, agent: alone}), backbones)


def _ids(call: Call) -> tuple[int, ...]:
    return tuple(i for item in call.items if isinstance(item, Tokens) for i in item.ids)
