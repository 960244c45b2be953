"""Every thought and message of a batch of records, up to the answer.

Shape legend: M thoughts of a record (their number may differ), D width of the agent, E width of
the target, N rows (agents x records), S columns, T target tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls, ConstantRows, Row
from recmas_compiler.lowering.training_graph.calls import Batch, Call
from recmas_runtime.formats.plan import Message, Plan, PrefillStep, Variant
from recmas_runtime.prompts.render import Tokens

Mode = Literal["teacher_forced", "rollout"]

Control = Literal["none", "null", "shuffled", "mean"]
"""What the answer agent gets instead of its messages, to see what the messages are worth."""


@dataclass(frozen=True, kw_only=True)
class AgentTurn:
    """One agent's turn in one round."""

    agent: str
    round: int
    variant: Variant
    messages: tuple[Message, ...]


def agent_turns(step: PrefillStep) -> tuple[AgentTurn, ...]:
    """Return the turns of a step's agents, which run as one batch."""
    return tuple(
        AgentTurn(
            agent=agent,
            round=step.round,
            variant=variant,
            messages=tuple(message for message in step.messages if message.agent == agent),
        )
        for agent, variant in zip(step.agents, step.variants, strict=True)
    )


class GradientTaps:
    """Adds up the gradients of link outputs while backward runs."""

    def __init__(self) -> None:
        self._squares: dict[tuple[str, int], Tensor] = {}

    def tap(self, output: Tensor, link_id: str, round_: int) -> None:
        """Watch what a link gave in a round; outputs without gradients are ignored."""
        if output.requires_grad:
            self._squares.setdefault((link_id, round_), output.new_zeros((), dtype=torch.float32))
            add = partial(self._add, (link_id, round_))
            output.register_hook(add)  # type: ignore[no-untyped-call]

    def norms(self) -> Mapping[tuple[str, int], float]:
        """Return the norm by link id and round, over all records and positions."""
        return {key: float(square.sqrt()) for key, square in self._squares.items()}

    def _add(self, key: tuple[str, int], gradient: Tensor) -> None:
        # No copy to the host here: that would hold up backward at every link.
        self._squares[key] = self._squares[key] + gradient.detach().float().square().sum()


class Latents:
    """Runs turns on a batch and keeps what they yield.

    Args:
        apply_link: Maps [..., in_dim] to [..., out_dim] by a link's id.

    Attributes:
        thoughts_MD: By agent and round, per record.
        turns_TD: By agent and round, per record: hidden states of a turn from the position before
            its first target token. Only in mode `teacher_forced`.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        batch: Batch,
        mode: Mode,
        agent_calls: Mapping[str, AgentCalls],
        apply_link: Callable[[str, Tensor], Tensor],
        taps: GradientTaps | None,
    ) -> None:
        self.thoughts_MD: dict[tuple[str, int], list[Tensor]] = {}
        self.turns_TD: dict[tuple[str, int], list[Tensor]] = {}
        self._plan = plan
        self._batch = batch
        self._mode = mode
        self._agent_calls = agent_calls
        self._apply_link = apply_link
        self._taps = taps
        self._constants: dict[str, ConstantRows] = {name: {} for name in agent_calls}
        self._inputs_MD: dict[tuple[str, int], list[Tensor]] = {}
        self._messages_ME: dict[tuple[str, int], list[Tensor]] = {}

    def think(self, turns: Sequence[AgentTurn], *, whole: bool) -> None:
        """Run a batch of turns; those that send them messages must have run before.

        Args:
            turns: Of agents that share a backbone and take equally many latent steps.
            whole: Read targets to their end, not only as far as the agents think.
        """
        num_steps = self._plan.agents[turns[0].agent].latent_steps
        if self._mode == "rollout":
            self._roll_out(turns, num_steps)
            return
        # Later positions change nothing before them, so they need not run.
        limit = None if whole else num_steps
        for turn, turns_TD in self.read_turns(turns, limit=limit).items():
            key = turn.agent, turn.round
            self.turns_TD[key] = turns_TD
            self.thoughts_MD[key] = [turn_TD[1:][:num_steps] for turn_TD in turns_TD]

    def read_turns(
        self, turns: Sequence[AgentTurn], *, limit: int | None = None, control: Control = "none"
    ) -> dict[AgentTurn, list[Tensor]]:
        """Read prompts and targets; return what `turns_TD` describes, by turn."""
        rows: list[Row] = []
        for turn in turns:
            calls = self._batch.calls[turn.agent, turn.variant, "turn"]
            cut = [call if limit is None else call.cut(limit) for call in calls]
            rows += self._rows(turn, cut, control)
        name = self._plan.agents[turns[0].agent].backbone
        hidden_NSD = self._agent_calls[name].read(rows, self._constants[name])
        states = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
        return dict(zip(turns, _parts(states, len(self._batch)), strict=True))

    def message(self, link_id: str, round_: int) -> list[Tensor]:
        """Return a link's message [M, E] of a round, per record; its source must have thought."""
        key = link_id, round_
        if key not in self._messages_ME:
            inputs_MD = self._inputs(self._plan.links[link_id].source, round_)
            self._messages_ME[key] = self._map(link_id, round_, inputs_MD)
        return self._messages_ME[key]

    def _roll_out(self, turns: Sequence[AgentTurn], num_steps: int) -> None:
        rows: list[Row] = []
        for turn in turns:
            calls = self._batch.calls[turn.agent, turn.variant, "prompt"]
            rows += self._rows(turn, calls, "none")

        def inner(hidden_ND: Tensor) -> Tensor:
            parts_BD = torch.split(hidden_ND, len(self._batch))
            return torch.cat(
                [
                    self._linked(self._plan.agents[turn.agent].inner, turn.round, part_BD)
                    for turn, part_BD in zip(turns, parts_BD, strict=True)
                ]
            )

        name = self._plan.agents[turns[0].agent].backbone
        thoughts_NMD, inputs_NMD = self._agent_calls[name].roll_out(
            rows, num_steps, inner, self._constants[name]
        )
        for i, turn in enumerate(turns):
            of_turn = slice(i * len(self._batch), (i + 1) * len(self._batch))
            self.thoughts_MD[turn.agent, turn.round] = list(thoughts_NMD[of_turn])
            self._inputs_MD[turn.agent, turn.round] = list(inputs_NMD[of_turn])

    def _rows(self, turn: AgentTurn, calls: Sequence[Call], control: Control) -> list[Row]:
        messages_ME = {
            message.slot: controlled(self.message(message.link, message.round), control)
            for message in turn.messages
        }
        rows = []
        for record, call in enumerate(calls):
            pieces: list[tuple[int, ...] | Tensor] = []
            for item in call.items:
                if isinstance(item, Tokens):
                    pieces.append(item.ids)
                elif item.agent in messages_ME and len(messages_ME[item.agent][record]):
                    pieces.append(messages_ME[item.agent][record])
            rows.append(Row(pieces=tuple(pieces), num_wanted=call.num_target_tokens + 1))
        return rows

    def _inputs(self, agent: str, round_: int) -> list[Tensor]:
        """Return R_k of an agent's thoughts, per record."""
        key = agent, round_
        if key not in self._inputs_MD:
            thoughts_MD = self.thoughts_MD[key]
            self._inputs_MD[key] = self._map(self._plan.agents[agent].inner, round_, thoughts_MD)
        return self._inputs_MD[key]

    def _map(self, link_id: str, round_: int, states_MD: Sequence[Tensor]) -> list[Tensor]:
        """Run a link once over the states of all records."""
        lengths = [len(states) for states in states_MD]
        output_NE = self._linked(link_id, round_, torch.cat(list(states_MD)))
        return list(torch.split(output_NE, lengths))

    def _linked(self, link_id: str, round_: int, states_ND: Tensor) -> Tensor:
        output_NE = self._apply_link(link_id, states_ND)
        if self._taps is not None:
            self._taps.tap(output_NE, link_id, round_)
        return output_NE


def _parts(states: list[Tensor], size: int) -> list[list[Tensor]]:
    return [states[first : first + size] for first in range(0, len(states), size)]


def controlled(messages_ME: Sequence[Tensor], control: Control) -> list[Tensor]:
    """Return what a slot gets under a control, per record of a batch.

    - `none`: the record's own message;
    - `null`: nothing;
    - `shuffled`: the message of the next record, the last one gets the first one's;
    - `mean`: for all records the same, position by position the mean over the messages that have
      the position. The record's own message is one of them, so in small batches this says a good
      part of what it says, and what `none` gains over it understates communication.

    Args:
        control: Which one. `shuffled` needs two records or more.
    """
    return CONTROLS[control](messages_ME)


def _own(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    return list(messages_ME)


def _nothing(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    return [message_ME[:0] for message_ME in messages_ME]


def _next(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    assert len(messages_ME) > 1, "one record has no other record's message"
    return [*messages_ME[1:], messages_ME[0]]


def _mean(messages_ME: Sequence[Tensor]) -> list[Tensor]:
    longest = max(len(message_ME) for message_ME in messages_ME)
    means_1E = [
        torch.stack([m[i] for m in messages_ME if len(m) > i]).mean(dim=0, keepdim=True)
        for i in range(longest)
    ]
    mean_ME = torch.cat(means_1E) if means_1E else messages_ME[0]
    return [mean_ME] * len(messages_ME)


CONTROLS: Final = MappingProxyType[Control, Callable[[Sequence[Tensor]], list[Tensor]]](
    {"none": _own, "null": _nothing, "shuffled": _next, "mean": _mean}
)
