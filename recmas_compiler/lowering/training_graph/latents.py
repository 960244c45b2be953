"""Every thought and message of a batch of records, up to the answer.

Shape legend: M thoughts of a record (their number may differ), D width of the agent, E width of
the target, N rows (agents x records), S columns, T target tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from recmas_compiler.ir.ops import System
from recmas_compiler.lowering.materialize import inner_link_id
from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls, ConstantRows
from recmas_compiler.lowering.training_graph.calls import Batch, Call
from recmas_compiler.lowering.training_graph.controls import Control, controlled
from recmas_compiler.lowering.training_graph.gradient_taps import GradientTaps
from recmas_compiler.lowering.training_graph.rows import Row
from recmas_compiler.lowering.training_graph.schedule import Site, Stage
from recmas_runtime.prompts.render import Tokens

Mode = Literal["teacher_forced", "rollout"]


class Latents:
    """Runs turns on a batch and keeps what they yield.

    Args:
        system: Agents and links.
        batch: The records.
        mode: Where thoughts come from.
        agent_calls: By the name of the shared backbone.
        apply_link: Maps [..., in_dim] to [..., out_dim] by a link's id.
        taps: Told of every link output; None if nobody asked.

    Attributes:
        thoughts_MD: By agent and round, per record.
        turns_TD: By agent and round, per record: hidden states of a turn from the position before
            its first target token. Only in mode `teacher_forced`.
    """

    def __init__(
        self,
        *,
        system: System,
        batch: Batch,
        mode: Mode,
        agent_calls: Mapping[str, AgentCalls],
        apply_link: Callable[[str, Tensor], Tensor],
        taps: GradientTaps | None,
    ) -> None:
        self.thoughts_MD: dict[tuple[str, int], list[Tensor]] = {}
        self.turns_TD: dict[tuple[str, int], list[Tensor]] = {}
        self._system = system
        self._batch = batch
        self._mode = mode
        self._agent_calls = agent_calls
        self._apply_link = apply_link
        self._taps = taps
        self._constants: dict[str, ConstantRows] = {name: {} for name in agent_calls}
        self._inputs_MD: dict[tuple[str, int], list[Tensor]] = {}
        self._messages_ME: dict[tuple[str, int], list[Tensor]] = {}

    def think(self, stage: Stage, *, whole: bool) -> None:
        """Run a stage; what it hears of must have run before.

        Args:
            stage: Its agents.
            whole: Read targets to their end, not only as far as the agents think.
        """
        if self._mode == "rollout":
            self._roll_out(stage)
            return
        # Later positions change nothing before them, so they need not run.
        limit = None if whole else stage.num_steps
        for site, turns_TD in self.read_turns(stage.sites, limit=limit).items():
            key = site.agent, site.round
            self.turns_TD[key] = turns_TD
            self.thoughts_MD[key] = [turn_TD[1:][: stage.num_steps] for turn_TD in turns_TD]

    def read_turns(
        self, sites: Sequence[Site], *, limit: int | None = None, control: Control = "none"
    ) -> dict[Site, list[Tensor]]:
        """Read prompts and targets; return what `turns_TD` describes, by site.

        Args:
            sites: Of agents that share a backbone.
            limit: Read this many target tokens at most.
            control: What slots get instead of messages.
        """
        rows: list[Row] = []
        for site in sites:
            calls = self._batch.calls[site.agent, site.variant, "turn"]
            cut = [call if limit is None else call.cut(limit) for call in calls]
            rows += self._rows(site, cut, control)
        name = self._backbone_of(sites[0])
        hidden_NSD = self._agent_calls[name].read(rows, self._constants[name])
        states = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
        return dict(zip(sites, _parts(states, len(self._batch)), strict=True))

    def message(self, link_id: str, round_: int) -> list[Tensor]:
        """Return a link's message [M, E] of a round, per record; its source must have thought."""
        key = link_id, round_
        if key not in self._messages_ME:
            inputs_MD = self._inputs(self._system.links[link_id].source, round_)
            self._messages_ME[key] = self._map(link_id, round_, inputs_MD)
        return self._messages_ME[key]

    def _roll_out(self, stage: Stage) -> None:
        rows: list[Row] = []
        for site in stage.sites:
            calls = self._batch.calls[site.agent, site.variant, "prompt"]
            rows += self._rows(site, calls, "none")

        def inner(hidden_ND: Tensor) -> Tensor:
            parts_BD = torch.split(hidden_ND, len(self._batch))
            return torch.cat(
                [
                    self._linked(inner_link_id(site.agent), site.round, part_BD)
                    for site, part_BD in zip(stage.sites, parts_BD, strict=True)
                ]
            )

        name = self._backbone_of(stage.sites[0])
        thoughts_NMD, inputs_NMD = self._agent_calls[name].roll_out(
            rows, stage.num_steps, inner, self._constants[name]
        )
        for i, site in enumerate(stage.sites):
            of_site = slice(i * len(self._batch), (i + 1) * len(self._batch))
            self.thoughts_MD[site.agent, site.round] = list(thoughts_NMD[of_site])
            self._inputs_MD[site.agent, site.round] = list(inputs_NMD[of_site])

    def _rows(self, site: Site, calls: Sequence[Call], control: Control) -> list[Row]:
        messages_ME = {
            slot: controlled(self.message(link_id, round_), control)
            for slot, link_id, round_ in site.links()
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
            self._inputs_MD[key] = self._map(inner_link_id(agent), round_, thoughts_MD)
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

    def _backbone_of(self, site: Site) -> str:
        return self._system.backbone_of(site.agent).name


def _parts(states: list[Tensor], size: int) -> list[list[Tensor]]:
    return [states[first : first + size] for first in range(0, len(states), size)]
