"""What an outer stage may add to the answer's cross-entropy, so that messages keep content.

Shape legend: B records with a loss, T target tokens of a record, D width of the answer agent,
V vocabulary, M vectors of a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, relu

from recmas_compiler.lowering.training_graph.calls import Batch, Call
from recmas_compiler.lowering.training_graph.constant_rows import ConstantRows
from recmas_compiler.lowering.training_graph.frozen_states import Reading
from recmas_compiler.lowering.training_graph.graph import (
    Loss,
    RoundLoss,
    TrainingGraph,
    target_ids,
    turn_loss,
)
from recmas_compiler.lowering.training_graph.latents import Latents, Mix, Received
from recmas_compiler.lowering.training_graph.padded_rows import Row
from recmas_compiler.spec.schema.train import OuterStageSection
from recmas_runtime.prompts.render import Tokens

Note = Callable[[str, Tensor], None]
"""Is told the vectors [N, E] of a link's messages."""


class Objective:
    """The loss of the outer stage: the answer's cross-entropy, and what the spec adds to it.

    Each addition is a mean over the answer's tokens, so that parts of a batch add up.
    """

    def __init__(self, graph: TrainingGraph, stage: OuterStageSection) -> None:
        self._graph = graph
        self._stage = stage

    def __call__(
        self,
        batch: Batch,
        *,
        partners: Sequence[int] | None = None,
        share: float = 0.0,
        note: Note | None = None,
    ) -> Loss:
        """Return the loss of a batch, its links watched.

        Args:
            partners: For each record of the batch the place of another one with another answer,
                whose messages it gets in `mismatch`; None leaves that out.
            share: The part of each message that is text.
            note: Is told every message.
        """
        graph, stage = self._graph, self._stage
        mix = Mix(share=share, said=self._said(batch)) if share else None
        latents = graph.latents(batch, watch=True, mix=mix, note=note)
        turns_TD = graph.read_answer(latents, batch)
        own = graph.turn_loss(graph.answer, batch, turns_TD)
        loss = graph.whole_loss(latents, batch, own)
        tokens_B = torch.tensor(own.tokens, device=own.sum_B.device)
        parts: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if stage.mismatch is not None and partners is not None:
            weights["mismatch"] = stage.mismatch.weight
            other = self._with_others(latents, batch, partners)
            gained_B = (other.sum_B - own.sum_B) / tokens_B
            parts["mismatch"] = (relu(stage.mismatch.margin - gained_B) * tokens_B).sum()
        if stage.teacher is not None:
            weights["teacher"] = stage.teacher.weight
            parts["teacher"] = self._divergence(latents, batch, turns_TD, stage.teacher.temperature)
        if stage.reconstruct is not None:
            weights["reconstruct"] = stage.reconstruct
            parts["reconstruct"] = (self._reconstruction(latents, batch) * tokens_B).sum()
        figures = {name: part.detach() for name, part in {"answer": loss.total, **parts}.items()}
        added = sum(weights[name] * part for name, part in parts.items())
        return replace(loss, total=loss.total + added, parts=figures)

    def _with_others(self, latents: Latents, batch: Batch, partners: Sequence[int]) -> RoundLoss:
        """Return the answer's loss with the messages of other records."""
        own = latents.received(self._graph.answer)
        others: Received = {
            slot: [messages[place] for place in partners] for slot, messages in own.items()
        }
        turns_TD = self._graph.read_answer(latents, batch, others)
        return self._graph.turn_loss(self._graph.answer, batch, turns_TD)

    def _divergence(
        self, latents: Latents, batch: Batch, turns_TD: Sequence[Tensor], temperature: float
    ) -> Tensor:
        """Return the divergence from the agent that reads text, summed over target tokens.

        Records whose targets are other tokens behind text count nothing.
        """
        answer, writer = self._graph.answer, self._graph.writer
        backbone = self._graph.backbone(answer.agent)
        own = batch.calls[answer.agent, answer.variant, "turn"]
        taught, places = [], []
        for place, example in enumerate(batch.examples[: batch.num_counted]):
            texts = {m.slot: writer.said(m.link, example) for m in answer.messages}
            call = writer.write(answer.agent, answer.variant, "turn", example, texts)
            if target_ids(call) == target_ids(own[place]):
                places.append(place)
                taught.append(_reading(call))
        if not taught:
            return turns_TD[0].new_zeros(())
        taught_TD = latents.read(answer.agent, taught)
        dtype = turns_TD[0].dtype
        teacher_ND = torch.cat([states_TD[:-1] for states_TD in taught_TD]).to(dtype)
        student_ND = torch.cat([turns_TD[place][:-1] for place in places])
        teacher_NV, student_NV = (
            log_softmax(_as_float(backbone.logits(states_ND)) / temperature, dim=-1)
            for states_ND in (teacher_ND, student_ND)
        )
        found = kl_div(student_NV, teacher_NV.detach(), reduction="sum", log_target=True)
        return temperature**2 * found

    def _reconstruction(self, latents: Latents, batch: Batch) -> Tensor:
        """Return the mean loss of what each record's messages should say, written from them."""
        found = [
            self._repetition(latents, batch, link, round_)
            for link, round_ in sorted(self._last_messages().items())
        ]
        return torch.stack(found).mean(dim=0)

    def _repetition(self, latents: Latents, batch: Batch, link: str, round_: int) -> Tensor:
        writer, plan = self._graph.writer, self._graph.plan
        source, target = plan.links[link].source, plan.links[link].target
        messages_ME = latents.message(link, round_)
        losses: list[Tensor] = []
        rows: list[Row] = []
        calls: list[Call] = []
        places: list[int] = []
        for place, example in enumerate(batch.examples[: batch.num_counted]):
            losses.append(messages_ME[place].new_zeros(()))
            text = writer.said(link, example)
            if text.strip():
                call = writer.write_repetition(target, source, text)
                pieces = tuple(
                    item.ids if isinstance(item, Tokens) else messages_ME[place]
                    for item in call.items
                    if isinstance(item, Tokens) or len(messages_ME[place])
                )
                rows.append(Row(pieces=pieces, num_wanted=call.num_target_tokens + 1))
                calls.append(call)
                places.append(place)
        if rows:
            backbone, name = self._graph.backbone(target), plan.agents[target].backbone
            hidden_NSD = latents.agent_calls[name].read(rows, ConstantRows())
            states = [h[-row.num_wanted :] for h, row in zip(hidden_NSD, rows, strict=True)]
            loss = turn_loss(backbone, states, calls, checkpointed=self._graph.checkpoint_calls)
            for place, sum_, tokens in zip(places, loss.sum_B, loss.tokens, strict=True):
                losses[place] = sum_ / tokens
        return torch.stack(losses)

    def _last_messages(self) -> dict[str, int]:
        """Return the links of vectors with the last round in which each one's message is read."""
        found: dict[str, int] = {}
        for turn in (*self._graph.thinking, self._graph.answer):
            for message in turn.messages:
                if self._graph.plan.links[message.link].has_vectors:
                    found[message.link] = max(message.round, found.get(message.link, 0))
        return found

    def _said(self, batch: Batch) -> Callable[[str, int], Tensor]:
        writer, plan = self._graph.writer, self._graph.plan

        def embeddings(link: str, record: int) -> Tensor:
            target = plan.links[link].target
            ids = writer.received_ids(target, writer.said(link, batch.examples[record]))
            device = next(self._graph.parameters()).device
            return self._graph.backbone(target).embed(
                torch.tensor(ids, dtype=torch.long, device=device)
            )

        return embeddings


def _reading(call: Call) -> Reading:
    """Return a turn without messages, whose states before each target token are wanted."""
    ids = tuple(i for item in call.items if isinstance(item, Tokens) for i in item.ids)
    wanted = call.num_target_tokens + 1
    row = Row(pieces=(ids,), num_wanted=wanted)
    places = range(len(ids) - wanted, len(ids))
    return Reading(row=row, places=tuple((place,) for place in places))


def _as_float(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
