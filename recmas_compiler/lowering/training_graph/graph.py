"""The program as one trainable module: backbones frozen, links learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.reference import module_name
from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls
from recmas_compiler.lowering.training_graph.calls import Batch, Call, CallKey, CallWriter, Form
from recmas_compiler.lowering.training_graph.compiled import Compiled
from recmas_compiler.lowering.training_graph.controls import Control
from recmas_compiler.lowering.training_graph.gradient_taps import GradientTaps
from recmas_compiler.lowering.training_graph.latents import Latents, Mode
from recmas_compiler.lowering.training_graph.loss import Loss, RoundLoss, turn_loss, weighted_loss
from recmas_compiler.lowering.training_graph.schedule import Site, make_schedule
from recmas_compiler.training.data.examples import TrainExample

Supervise = Literal["final", "all"]


class TrainingGraph(nn.Module):
    """A program that learns: the loss of the answer agent's text, with gradients for every link.

    All rounds run; `answer.stop_when` is for answering only. Agents that the program runs as one
    batch are one batch here.

    Args:
        program: Of level UNROLLED or PLANNED, with or without any pass.
        backbones: By the name of the shared backbone; they are frozen here.
        links: By link id.
        mode: Where thoughts come from: the hidden states over target texts, or a rollout.
        supervise: Whether earlier rounds in which the answer agent runs count too.
        checkpoint_calls: Keep a call's inputs only and compute it again for its gradients: memory
            for about a third more time.
        compile_calls: Run backbones and links as compiled graphs; where that fails, a
            `CompileWarning` says so and they run eagerly.
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
    ) -> None:
        super().__init__()
        self.program = program
        self.system = program.system
        self.mode = mode
        self.schedule = make_schedule(program)
        self._sites = (*self.schedule.thinking, self.schedule.answer)
        self._supervised = frozenset(self.schedule.earlier_answers if supervise == "all" else ())
        self.backbones = dict(backbones)
        self.frozen = nn.ModuleDict({name: b.model for name, b in backbones.items()})
        self.frozen.requires_grad_(False)
        self.links = nn.ModuleDict({module_name(name): link for name, link in links.items()})
        self._checkpoint_calls = checkpoint_calls
        self._writer = CallWriter(self.system, backbones)
        self._agent_calls = {
            name: AgentCalls(b, compile_calls=compile_calls, checkpoint_calls=checkpoint_calls)
            for name, b in backbones.items()
        }
        self._run_link = Compiled(_run_link, name="a link") if compile_calls else _run_link
        self._taps = GradientTaps()
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the links; backbones always stay in eval mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def link(self, link_id: str) -> nn.Module:
        """Return a link by its id, such as `planner->solver` or `planner.inner`."""
        return self.links[module_name(link_id)]

    def prepare(self, examples: Sequence[TrainExample]) -> Batch:
        """Render and tokenize every call of some records, for the graph's mode and for rollouts.

        Raises:
            RecmasError: With agent and record, RM500 for a field that prompts cannot use, RM206
                for a chat template that cannot render a call, RM700 for a missing target.
        """
        written = [self._write(example) for example in examples]
        return Batch(
            ids=tuple(example.id for example in examples),
            calls={key: tuple(calls[key] for calls in written) for key in written[0]},
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
        for site in self._sites:
            slots = {slot: messages[slot, round_] for slot, round_ in site.arrivals}
            num_steps = self.system.agents[site.agent].latent_steps
            forms = self._forms(site, self.mode)
            key = site.agent, site.round
            if "turn" in forms:
                turn = calls[site.agent, site.variant, "turn"]
                messages[key] = min(num_steps, turn.num_target_tokens)
                lengths[key] = turn.num_positions(slots)
            if "prompt" in forms:
                prompt = calls[site.agent, site.variant, "prompt"]
                messages[key] = num_steps
                # The last thought is not read any more.
                thought = prompt.num_positions(slots) + num_steps - 1
                lengths[key] = max(thought, lengths.get(key, 0))
        return lengths

    def forward(self, batch: Batch, *, watch: bool = False) -> Loss:
        """Return the loss that training lowers, in the graph's mode.

        Args:
            batch: From `prepare`.
            watch: Let `round_gradients` know of this pass.
        """
        latents = self.latents(batch, watch=watch)
        earlier: dict[int, RoundLoss] = {}
        for site in self._supervised:
            turns_TD = latents.turns_TD.get((site.agent, site.round))
            if turns_TD is None:
                turns_TD = latents.read_turns((site,))[site]
            earlier[site.round] = self._turn_loss(site, batch, turns_TD)
        final = self._answer_loss(latents, batch, "none")
        return weighted_loss(final, last_round=self.schedule.answer.round, earlier=earlier)

    def compare(
        self, batch: Batch, *, controls: Sequence[Control], mode: Mode | None = None
    ) -> dict[Control, Loss]:
        """Return the loss of the answer's own round under each control.

        The thinking part runs once for all of them. Earlier rounds do not count here: they would
        add the same to every control.

        Args:
            batch: From `prepare`.
            controls: What the answer agent's slots get in the last round.
            mode: `rollout` where the graph's own is `teacher_forced`.
        """
        latents = self.latents(batch, mode=mode)
        last_round = self.schedule.answer.round
        return {
            control: weighted_loss(
                self._answer_loss(latents, batch, control), last_round=last_round, earlier={}
            )
            for control in controls
        }

    def latents(self, batch: Batch, *, mode: Mode | None = None, watch: bool = False) -> Latents:
        """Run the thinking part: every thought and message that the answer needs.

        Args:
            batch: From `prepare`.
            mode: `rollout` where the graph's own is `teacher_forced`.
            watch: Let `round_gradients` know of this pass.
        """
        latents = Latents(
            system=self.system,
            batch=batch,
            mode=self.mode if mode is None else mode,
            agent_calls=self._agent_calls,
            apply_link=lambda link_id, states: self._run_link(self.link(link_id), states),
            taps=self._taps if watch else None,
        )
        for stage in self.schedule.stages:
            latents.think(stage, whole=not self._supervised.isdisjoint(stage.sites))
        return latents

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
        for site in self._sites:
            for form in (*self._forms(site, self.mode), *self._forms(site, "rollout")):
                key = site.agent, site.variant, form
                if key not in calls:
                    calls[key] = self._writer.write(*key, example)
        return calls

    def _forms(self, site: Site, mode: Mode) -> tuple[Form, ...]:
        """Return the calls that a turn makes."""
        if mode == "teacher_forced" or site is self.schedule.answer:
            return ("turn",)
        return ("prompt", "turn") if site in self._supervised else ("prompt",)

    def _answer_loss(self, latents: Latents, batch: Batch, control: Control) -> RoundLoss:
        answer = self.schedule.answer
        return self._turn_loss(
            answer, batch, latents.read_turns((answer,), control=control)[answer]
        )

    def _turn_loss(self, site: Site, batch: Batch, turns_TD: Sequence[Tensor]) -> RoundLoss:
        return turn_loss(
            self.backbones[self.system.backbone_of(site.agent).name],
            turns_TD,
            batch.calls[site.agent, site.variant, "turn"],
            checkpointed=self._checkpoint_calls,
        )


def _run_link(link: nn.Module, states: Tensor) -> Tensor:
    # Links are float32 whatever the backbones are.
    mapped: Tensor = link(states.to(next(link.parameters()).dtype))
    return mapped
