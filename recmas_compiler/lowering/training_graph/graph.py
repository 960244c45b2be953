"""The program as one trainable module: backbones frozen, links learning; and its loss.

Shape legend: B records, N target tokens of all records, D width of the agent, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.reference import ProgramModule
from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls, Compiled, recomputed
from recmas_compiler.lowering.training_graph.calls import (
    Batch,
    Call,
    CallKey,
    CallWriter,
    Form,
    TrainExample,
)
from recmas_compiler.lowering.training_graph.frozen_states import FrozenStates
from recmas_compiler.lowering.training_graph.latents import (
    AgentTurn,
    GradientTaps,
    Latents,
    Mix,
    Mode,
    Received,
    agent_turns,
    context_places,
    sent_links,
)
from recmas_runtime.formats.plan import LinkPlan, PrefillStep
from recmas_runtime.prompts.render import Tokens

# What `supervise: all` gives the rounds before the last one, all together.
EARLIER_ROUNDS_WEIGHT: Final = 0.1

Supervise = Literal["final", "all"]


class TrainingGraph(ProgramModule):
    """A program that learns: the loss of the answer agent's text, with gradients for every link.

    All rounds run: `answer.stop_when` is for answering only. Agents that the program runs as one
    batch are one batch here.

    Args:
        mode: Where thoughts come from: the hidden states over target texts, or a rollout.
        supervise: Whether earlier rounds in which the answer agent runs count too.
        checkpoint_calls: Keep a call's inputs only and compute it again for its gradients: memory
            for about a third more time.
        compile_calls: Run backbones and links as compiled graphs; where that fails, a
            `CompileWarning` says so and they run eagerly.
        pack_weights: Pack the backbones' weights before the first call; they are gone then.
    """

    def __init__(
        self,
        program: Graph,
        *,
        backbones: Mapping[str, TorchBackbone],
        links: Mapping[str, nn.Module],
        mode: Mode,
        supervise: Supervise = "final",
        checkpoint_calls: bool = False,
        compile_calls: bool = False,
        pack_weights: bool = False,
    ) -> None:
        super().__init__(program, backbones=backbones, links=links)
        self.frozen.requires_grad_(False)
        self.mode = mode
        prefills = (step for step in self.plan.steps if isinstance(step, PrefillStep))
        *batches, (self.answer,) = map(agent_turns, prefills)
        self.batches = tuple(batches)
        self._supervised = tuple(
            turn for turn in self.thinking if supervise == "all" and turn.agent == self.answer.agent
        )
        self.checkpoint_calls = checkpoint_calls
        self.writer = CallWriter(self.system, backbones)
        self._agent_calls = {
            name: AgentCalls(
                b,
                compile_calls=compile_calls,
                checkpoint_calls=checkpoint_calls,
                pack_weights=pack_weights,
            )
            for name, b in backbones.items()
        }
        self._run_link = Compiled(_run_link, name="a link") if compile_calls else _run_link
        self._taps = GradientTaps()
        self._sent = sent_links(self.plan)
        self._frozen_states = FrozenStates()

    @property
    def thinking(self) -> tuple[AgentTurn, ...]:
        """The turns of all batches: all but the answer's."""
        return tuple(turn for batch in self.batches for turn in batch)

    @property
    def used_links(self) -> frozenset[str]:
        """The ids of the links that messages pass on their way to the answer."""
        messages = (m.link for turn in (*self.thinking, self.answer) for m in turn.messages)
        outer = {link for link in messages if self.plan.links[link].has_vectors}
        sources = (self.plan.links[link].source for link in outer)
        return frozenset(outer | {self.plan.agents[source].inner for source in sources})

    def prepare(self, examples: Sequence[TrainExample], *, num_counted: int | None = None) -> Batch:
        """Render and tokenize every call of some records, for the graph's mode and for rollouts.

        Args:
            num_counted: So many of the first records have a loss, the others only send messages;
                None for all.

        Raises:
            RecmasError: With agent and record, RM500 for a field that prompts cannot use, RM206
                for a chat template that cannot render a call, RM700 for a missing target.
        """
        written = [self._write(example) for example in examples]
        return Batch(
            examples=tuple(examples),
            calls={key: tuple(calls[key] for calls in written) for key in written[0]},
            num_counted=len(examples) if num_counted is None else num_counted,
        )

    def lengths(self, example: TrainExample) -> dict[tuple[str, int], int]:
        """Return the positions of each call of a record, by agent and round.

        A call is a prompt with its slots filled, and the whole target text or the latent steps
        behind it.

        Raises:
            RecmasError: As `prepare`.
        """
        calls = self._write(example)
        messages: dict[tuple[str, int], int] = {}
        lengths: dict[tuple[str, int], int] = {}
        for turn in (*self.thinking, self.answer):
            slots = {
                message.slot: messages[message.link, message.round] for message in turn.messages
            }
            sent = self._sent.get((turn.agent, turn.round), ())
            longest = 0
            for form in self._forms(turn, self.mode):
                call = calls[turn.agent, turn.variant, form]
                behind = 0 if form == "turn" else self._behind_prompt(turn, example)
                longest = max(longest, call.num_positions(slots) + behind)
            lengths[turn.agent, turn.round] = longest
            for link in sent:
                messages[link, turn.round] = self._message_length(link, turn, example, calls, slots)
        return lengths

    def _behind_prompt(self, turn: AgentTurn, example: TrainExample) -> int:
        """Return how many positions run behind a turn's prompt."""
        forms = [self.plan.links[link] for link in self._sent.get((turn.agent, turn.round), ())]
        thought = 0
        if self.mode == "rollout" and any(form.needs_thoughts for form in forms):
            # The last thought is not read any more.
            thought = self.plan.agents[turn.agent].latent_steps - 1
        written = max((self._num_written(form, example) for form in forms), default=0)
        return max(thought, written)

    def _num_written(self, form: LinkPlan, example: TrainExample) -> int:
        """Return at most how many tokens a sender writes for a link."""
        if not form.needs_text:
            return 0
        if self.mode == "teacher_forced" and form.source in example.targets:
            return len(self.writer.written_ids(form.source, example, form.max_tokens))
        return form.max_tokens or 0

    def _message_length(
        self,
        link_id: str,
        turn: AgentTurn,
        example: TrainExample,
        calls: Mapping[CallKey, Call],
        slots: Mapping[str, int],
    ) -> int:
        """Return how many positions a message takes, that of a text nearly."""
        form, num_steps = self.plan.links[link_id], self.plan.agents[turn.agent].latent_steps
        taken = {
            message.slot: slots[message.slot]
            for message in turn.messages
            if self.plan.links[message.link].has_vectors
        }
        match form.carries:
            case "thoughts":
                if self.mode == "rollout":
                    return num_steps
                return min(num_steps, calls[turn.agent, turn.variant, "turn"].num_target_tokens)
            case "context":
                prompt = calls[turn.agent, turn.variant, "prompt"]
                return len(context_places(prompt, form, taken, num_steps))
            case "cache":
                placed = calls[turn.agent, turn.variant, "prompt"].placed
                assert placed is not None, "the prompt of an agent that hands it over"
                lengths = {
                    "context": placed.num_rows("context", taken),
                    "prompt": placed.num_rows("prompt", taken),
                    "thoughts": num_steps - 1,
                    "written": self._num_written(form, example),
                }
                return sum(lengths[kind] for kind in form.rows)
            case _:
                return self._num_written(form, example)

    def forward(self, batch: Batch, *, watch: bool = False) -> Loss:
        """Return the loss that training lowers, in the graph's mode.

        Args:
            watch: Count this pass in `round_gradients`.
        """
        latents = self.latents(batch, watch=watch)
        final = self.turn_loss(self.answer, batch, self.read_answer(latents, batch))
        return self.whole_loss(latents, batch, final)

    def whole_loss(self, latents: Latents, batch: Batch, final: RoundLoss) -> Loss:
        """Return the answer's loss with that of earlier rounds, where they count."""
        earlier: dict[int, RoundLoss] = {}
        for turn in self._supervised:
            turns_TD = latents.turns_TD.get((turn.agent, turn.round))
            if turns_TD is None:
                turns_TD = latents.read_turns((turn,), count=batch.num_counted)[turn]
            earlier[turn.round] = self.turn_loss(turn, batch, turns_TD[: batch.num_counted])
        return weighted_loss(final, last_round=self.answer.round, earlier=earlier)

    def read_answer(
        self, latents: Latents, batch: Batch, received: Received | None = None
    ) -> list[Tensor]:
        """Return the answer's hidden states, as `Latents.turns_TD` describes them.

        Args:
            received: What its slots get in place of the records' own messages.
        """
        found = latents.read_turns((self.answer,), received=received, count=batch.num_counted)
        return found[self.answer]

    def received(self, batch: Batch, *, mode: Mode | None = None) -> Received:
        """Return the messages for the answer agent's slots in the last round.

        Args:
            mode: `rollout` where the graph's own is `teacher_forced`.
        """
        return self.latents(batch, mode=mode).received(self.answer)

    def answer_loss(self, batch: Batch, received: Received) -> Loss:
        """Return the loss of the answer's own round from given messages, whosever they are.

        Earlier rounds do not count here: they would add the same to every control.
        """
        turns_TD = self.read_answer(self._latents(batch), batch, received)
        final = self.turn_loss(self.answer, batch, turns_TD)
        return weighted_loss(final, last_round=self.answer.round, earlier={})

    def latents(
        self,
        batch: Batch,
        *,
        mode: Mode | None = None,
        watch: bool = False,
        mix: Mix | None = None,
        note: Callable[[str, Tensor], None] | None = None,
    ) -> Latents:
        """Run the thinking part: every thought and message that the answer needs.

        Args:
            mode: Another one than the graph's own.
            watch: Count gradients in `round_gradients`.
            mix: Messages that are text in part.
            note: Is told the vectors [N, E] of every link's messages.
        """
        latents = self._latents(batch, mode=mode, watch=watch, mix=mix, note=note)
        for turns in self.batches:
            latents.run(turns, whole=any(turn in self._supervised for turn in turns))
        return latents

    def _latents(
        self,
        batch: Batch,
        *,
        mode: Mode | None = None,
        watch: bool = False,
        mix: Mix | None = None,
        note: Callable[[str, Tensor], None] | None = None,
    ) -> Latents:
        return Latents(
            plan=self.plan,
            batch=batch,
            mode=self.mode if mode is None else mode,
            backbones=self.backbones,
            agent_calls=self._agent_calls,
            writer=self.writer,
            frozen=self._frozen_states,
            apply_link=lambda link_id, states: self._run_link(self.link(link_id), states),
            taps=self._taps if watch else None,
            mix=mix,
            note=note,
        )

    def round_gradients(self) -> Mapping[tuple[str, int], float]:
        """Return the norm of the gradient at each link's output, by link id and round.

        Covers the watched passes since the last time it was asked for; call it after backward. A
        link that runs several times in a round counts once, with all of them.
        """
        taps, self._taps = self._taps, GradientTaps()
        return taps.norms()

    def _write(self, example: TrainExample) -> dict[CallKey, Call]:
        """Return the calls of one record: what the graph's own mode needs, and for a rollout."""
        calls: dict[CallKey, Call] = {}
        for turn in (*self.thinking, self.answer):
            for form in (*self._forms(turn, self.mode), *self._forms(turn, "rollout")):
                key = turn.agent, turn.variant, form
                if key not in calls:
                    calls[key] = self.writer.write(*key, example)
        return calls

    def _forms(self, turn: AgentTurn, mode: Mode) -> tuple[Form, ...]:
        """Return the calls that a turn makes."""
        if turn is self.answer:
            return ("turn",)
        links = [self.plan.links[link] for link in self._sent.get((turn.agent, turn.round), ())]
        is_forced = mode == "teacher_forced" and any(link.needs_thoughts for link in links)
        reads_prompt = mode == "rollout" or any(
            link.carries in ("context", "cache") or link.needs_text for link in links
        )
        forms: tuple[Form, ...] = ("prompt",) if reads_prompt else ()
        return (*forms, "turn") if is_forced or turn in self._supervised else forms

    def turn_loss(self, turn: AgentTurn, batch: Batch, turns_TD: Sequence[Tensor]) -> RoundLoss:
        """Return the loss of a turn's targets, from its hidden states."""
        return turn_loss(
            self.backbone(turn.agent),
            turns_TD,
            batch.calls[turn.agent, turn.variant, "turn"][: batch.num_counted],
            checkpointed=self.checkpoint_calls,
        )

    def backbone(self, agent: str) -> TorchBackbone:
        """Return the backbone that an agent runs on."""
        return self.backbones[self.plan.agents[agent].backbone]


def _run_link(link: nn.Module, states: Tensor) -> Tensor:
    # Links are float32 whatever the backbones are.
    mapped: Tensor = link(states.to(next(link.parameters()).dtype))
    return mapped


@dataclass(frozen=True, kw_only=True)
class RoundLoss:
    """The cross-entropy of one round, by record: the parts of a `Loss`."""

    sum_B: Tensor
    tokens: tuple[int, ...]
    is_exact_B: Tensor


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The cross-entropy of a batch.

    Attributes:
        total: Sum over the answer agent's target tokens, weighted earlier rounds included. A sum,
            so that parts of a batch add up and whoever adds them divides once.
        tokens: Target tokens of the last round: what `total` is divided by.
        per_record_sum: [B], without gradients; adds up to `total`.
        per_record_exact: [B], whether greedy decoding would write the target in the last round, up
            to the token that ends it.
        rounds: Unweighted sum and number of tokens by round.
        parts: By name, the answer's part of `total` and what was added to it, unweighted; empty
            where nothing was. `per_record_sum` is the answer's.
    """

    total: Tensor
    tokens: int
    per_record_sum: Tensor
    per_record_tokens: Tensor
    per_record_exact: Tensor
    rounds: Mapping[int, tuple[Tensor, int]]
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The loss that training lowers."""
        return self.total / self.tokens


def turn_loss(
    backbone: TorchBackbone,
    turns_TD: Sequence[Tensor],
    calls: Sequence[Call],
    *,
    checkpointed: bool,
) -> RoundLoss:
    """Return the loss of target texts.

    Args:
        turns_TD: By record, hidden states from the position before the first target token on.
    """
    tokens = tuple(call.num_target_tokens for call in calls)
    # A token is seen from the position before it; from the last one there is nothing to see.
    states_ND = torch.cat([turn_TD[:-1] for turn_TD in turns_TD])
    targets_N = torch.tensor([i for call in calls for i in target_ids(call)])

    def run(states_ND: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = backbone.logits(states_ND)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        wanted_N = targets_N.to(logits_NV.device)
        is_first_N = logits_NV.detach().argmax(-1) == wanted_N
        return cross_entropy(logits_NV, wanted_N, reduction="none"), is_first_N

    found = recomputed(run, states_ND, checkpointed=checkpointed)
    losses, is_first = (torch.split(values_N, list(tokens)) for values_N in found)
    answered = [_num_answered(call, backbone.eos_token_ids) for call in calls]
    # Each token is the likeliest after the target's own tokens before it, so greedy decoding, which
    # begins with the first of them, writes them all; and if one is not, it differs there.
    exact = [is_first_T[:num].all() for is_first_T, num in zip(is_first, answered, strict=True)]
    return RoundLoss(
        sum_B=torch.stack([losses_T.sum() for losses_T in losses]),
        tokens=tokens,
        is_exact_B=torch.stack(exact),
    )


def weighted_loss(final: RoundLoss, *, last_round: int, earlier: Mapping[int, RoundLoss]) -> Loss:
    """Return the loss of the last round, with a small part of that of earlier ones."""
    sum_B = final.sum_B
    for loss in earlier.values():
        sum_B = sum_B + EARLIER_ROUNDS_WEIGHT / len(earlier) * loss.sum_B
    return Loss(
        total=sum_B.sum(),
        tokens=sum(final.tokens),
        per_record_sum=sum_B.detach(),
        per_record_tokens=torch.tensor(final.tokens),
        per_record_exact=final.is_exact_B,
        rounds={
            round_: (loss.sum_B.detach().sum(), sum(loss.tokens))
            for round_, loss in {**earlier, last_round: final}.items()
        },
    )


def target_ids(call: Call) -> tuple[int, ...]:
    """Return the tokens of a turn's target."""
    last = call.items[-1]
    assert isinstance(last, Tokens), "the target is text"
    return last.ids[-call.num_target_tokens :]


def _num_answered(call: Call, ends: Sequence[int]) -> int:
    """Return how many target tokens an answer has; what a template writes behind its end is not."""
    ids = target_ids(call)
    return next((place + 1 for place, i in enumerate(ids) if i in ends), len(ids))
