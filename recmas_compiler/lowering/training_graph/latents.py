"""Every thought and message of a batch of records, up to the answer.

Shape legend: M thoughts of a record (their number may differ), D width of the agent, E width of
the target, N rows (agents x records), S columns, T target tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls, ConstantRows, Row
from recmas_compiler.lowering.training_graph.calls import Batch, Call
from recmas_runtime.formats.plan import Message, Plan, PrefillStep, Variant
from recmas_runtime.prompts.render import Tokens

Mode = Literal["teacher_forced", "rollout"]

_ByTurn = dict[tuple[str, int], list[Tensor]]
"""A tensor for each record, by agent (or link) and round."""

Received = dict[str, list[Tensor]]
"""What a turn's slots get: by slot the message [M, D] of each record."""


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


@dataclass(eq=False, kw_only=True)
class Latents:
    """Runs turns on a batch and keeps what they yield.

    Attributes:
        apply_link: Maps [..., in_dim] to [..., out_dim] by a link's id.
        thoughts_MD: By agent and round, per record.
        turns_TD: By agent and round, per record: hidden states of a turn from the position before
            its first target token. Only in mode `teacher_forced`.
    """

    plan: Plan
    batch: Batch
    mode: Mode
    agent_calls: Mapping[str, AgentCalls]
    apply_link: Callable[[str, Tensor], Tensor]
    taps: GradientTaps | None
    thoughts_MD: _ByTurn = field(default_factory=dict, init=False)
    turns_TD: _ByTurn = field(default_factory=dict, init=False)
    _inputs_MD: _ByTurn = field(default_factory=dict, init=False)
    _messages_ME: _ByTurn = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._constants: dict[str, ConstantRows] = {name: {} for name in self.agent_calls}

    def think(self, turns: Sequence[AgentTurn], *, whole: bool) -> None:
        """Run a batch of turns; those that send them messages must have run before.

        Args:
            turns: Of agents that share a backbone and take equally many latent steps.
            whole: Read targets to their end, not only as far as the agents think.
        """
        num_steps = self.plan.agents[turns[0].agent].latent_steps
        if self.mode == "rollout":
            self._roll_out(turns, num_steps)
            return
        # Later positions change nothing before them, so they need not run.
        limit = None if whole else num_steps
        for turn, turns_TD in self.read_turns(turns, limit=limit).items():
            key = turn.agent, turn.round
            self.turns_TD[key] = turns_TD
            self.thoughts_MD[key] = [turn_TD[1:][:num_steps] for turn_TD in turns_TD]

    def read_turns(
        self,
        turns: Sequence[AgentTurn],
        *,
        limit: int | None = None,
        received: Received | None = None,
    ) -> dict[AgentTurn, list[Tensor]]:
        """Read prompts and targets; return what `turns_TD` describes, by turn.

        Args:
            received: What the slots get in place of the records' own messages.
        """
        rows: list[Row] = []
        for turn in turns:
            calls = self.batch.calls[turn.agent, turn.variant, "turn"]
            cut = [call if limit is None else call.cut(limit) for call in calls]
            rows += self._rows(turn, cut, self.received(turn) if received is None else received)
        name = self.plan.agents[turns[0].agent].backbone
        hidden_NSD = self.agent_calls[name].read(rows, self._constants[name])
        states = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
        size = len(self.batch)
        return {turn: states[i * size : (i + 1) * size] for i, turn in enumerate(turns)}

    def message(self, link_id: str, round_: int) -> list[Tensor]:
        """Return a link's message [M, E] of a round, per record; its source must have thought."""
        key = link_id, round_
        if key not in self._messages_ME:
            inputs_MD = self._inputs(self.plan.links[link_id].source, round_)
            self._messages_ME[key] = self._map(link_id, round_, inputs_MD)
        return self._messages_ME[key]

    def _roll_out(self, turns: Sequence[AgentTurn], num_steps: int) -> None:
        rows: list[Row] = []
        for turn in turns:
            calls = self.batch.calls[turn.agent, turn.variant, "prompt"]
            rows += self._rows(turn, calls, self.received(turn))

        def inner(hidden_ND: Tensor) -> Tensor:
            parts_BD = torch.split(hidden_ND, len(self.batch))
            return torch.cat(
                [
                    self._linked(self.plan.agents[turn.agent].inner, turn.round, part_BD)
                    for turn, part_BD in zip(turns, parts_BD, strict=True)
                ]
            )

        name = self.plan.agents[turns[0].agent].backbone
        thoughts_NMD, inputs_NMD = self.agent_calls[name].roll_out(
            rows, num_steps, inner, self._constants[name]
        )
        for i, turn in enumerate(turns):
            of_turn = slice(i * len(self.batch), (i + 1) * len(self.batch))
            self.thoughts_MD[turn.agent, turn.round] = list(thoughts_NMD[of_turn])
            self._inputs_MD[turn.agent, turn.round] = list(inputs_NMD[of_turn])

    def received(self, turn: AgentTurn) -> Received:
        """Return the records' own messages for a turn; their sources must have thought."""
        return {
            message.slot: self.message(message.link, message.round) for message in turn.messages
        }

    def _rows(self, turn: AgentTurn, calls: Sequence[Call], messages_ME: Received) -> list[Row]:
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
            self._inputs_MD[key] = self._map(self.plan.agents[agent].inner, round_, thoughts_MD)
        return self._inputs_MD[key]

    def _map(self, link_id: str, round_: int, states_MD: Sequence[Tensor]) -> list[Tensor]:
        """Run a link once over the states of all records."""
        lengths = [len(states) for states in states_MD]
        output_NE = self._linked(link_id, round_, torch.cat(list(states_MD)))
        return list(torch.split(output_NE, lengths))

    def _linked(self, link_id: str, round_: int, states_ND: Tensor) -> Tensor:
        output_NE = self.apply_link(link_id, states_ND)
        if self.taps is not None:
            self.taps.tap(output_NE, link_id, round_)
        return output_NE
