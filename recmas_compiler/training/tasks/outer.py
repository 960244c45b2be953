"""The outer stage: cross-entropy on the answer's text, through every link, agent and round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final

import torch
from torch import nn

from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_compiler.lowering.training_graph.graph import Loss, TrainingGraph
from recmas_compiler.lowering.training_graph.latents import Received
from recmas_compiler.training.loop.distributed import World
from recmas_compiler.training.loop.loop import AtStep
from recmas_compiler.training.tasks.additions import Additions
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Advance
from recmas_runtime.running.baselines import LATENT
from recmas_runtime.running.controls import (
    MEAN,
    NULL,
    SEED,
    SHUFFLED,
    Exchange,
    MeanMessages,
    exchange,
    sender_inputs,
)

# The records' own messages, and the controls, by the names that figures have.
CONTROLS: Final = (LATENT, NULL, SHUFFLED, MEAN)


@dataclass(eq=False)
class OuterTask:
    """Trains all links of a graph together.

    Attributes:
        links: What learns, by link id; the graph's other links stay as they are.
        batch_size: Records of a measurement's batch.
        rates: Highest learning rates by link id, where they are not the stage's.
        additions: What the stage does besides the answer's cross-entropy; None for nothing.
    """

    graph: TrainingGraph
    links: Mapping[str, nn.Module]
    _: KW_ONLY
    train: Sequence[TrainExample]
    held_out: Sequence[TrainExample]
    batch_size: int
    rates: Mapping[str, float] = field(default_factory=dict)
    additions: Additions | None = None

    def __post_init__(self) -> None:
        self.name = "the outer stage"
        self.num_examples = len(self.train)

    def loss(self, places: Sequence[int], at: AtStep | None = None) -> Loss:
        """Return the loss of the records at these places."""
        if self.additions is not None and at is not None:
            return self.additions.loss(places, at)
        batch = self.graph.prepare([self.train[place] for place in places])
        loss: Loss = self.graph(batch, watch=True)
        return loss

    def finish_step(self, at: AtStep, world: World) -> None:
        """Do what was asked for besides learning."""
        if self.additions is not None:
            self.additions.finish_step(at, world)

    @torch.no_grad()
    def measure(self, world: World) -> Mapping[str, Any]:
        """Return the held-out loss with generated thoughts, and under every control.

        Only what beats `shuffled` and `mean` is communication; the rest is a learned soft prompt.
        """
        if not self.held_out:
            return {}
        sums = torch.zeros(len(CONTROLS), 2, dtype=torch.float64, device=world.device)
        for name, _, loss in control_losses(
            self.graph, self.held_out, batch_size=self.batch_size, world=world
        ):
            row = CONTROLS.index(name)
            sums[row, 0] += loss.total.double()
            sums[row, 1] += loss.tokens
        world.add_up(sums)
        figures = zip(CONTROLS, sums.tolist(), strict=True)
        return {name: total / tokens for name, (total, tokens) in figures if tokens}

    def control_figures(self) -> Mapping[str, Any]:
        """Return how `shuffled` chose among the held-out records; empty where it could not."""
        chosen = chosen_senders(self.graph, self.held_out)
        if chosen is None:
            return {}
        return {
            "records": len(chosen.senders),
            "seed": SEED,
            "repeated": chosen.num_repeated,
            "same_input": len(chosen.same_input),
        }

    def gradient_figures(self, tokens: float) -> Mapping[str, Any]:
        """Return the gradient norm at each link's output by round, of this process's records.

        Also, where something was added to the loss, the means of its parts.
        """
        norms = self.graph.round_gradients()
        added = {} if self.additions is None else self.additions.figures(tokens)
        return {
            "round_grad_norm": {
                f"{link_id}@{round_}": norm / tokens for (link_id, round_), norm in norms.items()
            },
            **added,
        }


def chosen_senders(graph: TrainingGraph, examples: Sequence[TrainExample]) -> Exchange | None:
    """Return which record's messages each gets; None where no two answers differ."""
    answerer = graph.answer.agent
    try:
        return exchange(
            [(example.targets[answerer],) for example in examples],
            [sender_inputs(graph.plan, {**e.fields, "id": e.id}) for e in examples],
        )
    except RecmasError:
        return None


@torch.no_grad()
def control_losses(
    graph: TrainingGraph, examples: Sequence[TrainExample], *, batch_size: int, world: World
) -> Iterator[tuple[str, list[int], Loss]]:
    """Yield the loss of every batch under every control, with the places of its records.

    Controls are over all records, whatever the batches. With a single record there are no other
    messages, and no `shuffled` and `mean`; nor is there `shuffled` where all answers agree, nor
    `mean` where a slot of the answer agent holds a text or rows.
    """
    batches = world.share(_batches(len(examples), batch_size))
    own: list[dict[str, torch.Tensor]] = [{} for _ in examples]
    for places in batches:
        batch = graph.prepare([examples[place] for place in places])
        # A gold text's hidden states carry the answer: thoughts are always generated here.
        received = graph.received(batch, mode="rollout")
        for slot, messages_ME in received.items():
            for place, message_ME in zip(places, messages_ME, strict=True):
                if isinstance(message_ME, torch.Tensor):
                    own[place][slot] = message_ME
        yield LATENT, places, graph.answer_loss(batch, received)
        empty = {slot: [m[:0] for m in messages_ME] for slot, messages_ME in received.items()}
        yield NULL, places, graph.answer_loss(batch, empty)
    if len(examples) < 2:
        return
    chosen = chosen_senders(graph, examples)
    if not all(graph.plan.links[message.link].has_vectors for message in graph.answer.messages):
        for places in batches:
            if chosen is None:
                return
            batch = graph.prepare([examples[place] for place in places])
            # These messages are too large to keep: the other records' agents run again.
            senders_of = [examples[chosen.senders[place]] for place in places]
            received = graph.received(graph.prepare(senders_of), mode="rollout")
            yield SHUFFLED, places, graph.answer_loss(batch, received)
        return
    _gather(graph, own, world)
    mean = MeanMessages()
    for messages in own:
        mean.add({slot: message_ME.cpu().numpy() for slot, message_ME in messages.items()})
    for places in batches:
        batch = graph.prepare([examples[place] for place in places])
        if chosen is not None:
            senders = [own[chosen.senders[place]] for place in places]
            yield SHUFFLED, places, graph.answer_loss(batch, _by_slot(senders))
        means = [
            {
                slot: torch.from_numpy(mean.of_others(slot, message_ME.cpu().numpy())).to(
                    message_ME
                )
                for slot, message_ME in own[place].items()
            }
            for place in places
        ]
        yield MEAN, places, graph.answer_loss(batch, _by_slot(means))


def _by_slot(records: Sequence[Mapping[str, torch.Tensor]]) -> Received:
    # Of their own type: a list of vectors is not one of messages of any kind.
    return {slot: [messages[slot] for messages in records] for slot in records[0]}


def _gather(graph: TrainingGraph, own: list[dict[str, torch.Tensor]], world: World) -> None:
    """Give every process the messages of all records; each has those of its own batches."""
    if world.size == 1:
        return
    width = graph.backbones[graph.plan.agents[graph.answer.agent].backbone].facts.width
    for slot in (message.slot for message in graph.answer.messages):
        lengths_N = torch.zeros(len(own), dtype=torch.float64, device=world.device)
        for place, messages in enumerate(own):
            lengths_N[place] = len(messages[slot]) if slot in messages else 0
        world.add_up(lengths_N)
        counts = [int(length) for length in lengths_N.tolist()]
        whole_NME = torch.zeros(len(own), max(counts), width, device=world.device)
        for place, messages in enumerate(own):
            if slot in messages:
                whole_NME[place, : counts[place]] = messages[slot]
        world.add_up(whole_NME)
        for place, messages in enumerate(own):
            messages[slot] = whole_NME[place, : counts[place]]


def exact_answers(
    graph: TrainingGraph, examples: Sequence[TrainExample], *, batch_size: int
) -> dict[str, list[bool]]:
    """Tell, by control, whether greedy decoding would write each record's target.

    Thoughts are generated, as in a running system.
    """
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    found: dict[str, dict[int, bool]] = {}
    for name, places, loss in control_losses(graph, examples, batch_size=batch_size, world=alone):
        exact = loss.per_record_exact.tolist()
        found.setdefault(name, {}).update(zip(places, exact, strict=True))
    return {
        name: [by_place[place] for place in sorted(by_place)] for name, by_place in found.items()
    }


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


def _batches(num_examples: int, size: int) -> list[list[int]]:
    """Return places in batches."""
    return [
        list(range(first, min(first + size, num_examples)))
        for first in range(0, num_examples, size)
    ]
