"""Every thought and message of a batch of records, up to the answer.

Shape legend: M thoughts of a record (their number may differ), D width of the agent, E width of
the target, N rows (agents x records), S columns, T target tokens of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.lowering.torch_rows import Rows, cut_rows, join_rows, seen_rows
from recmas_compiler.lowering.training_graph.agent_calls import AgentCalls
from recmas_compiler.lowering.training_graph.calls import Batch, Call, CallWriter, Form
from recmas_compiler.lowering.training_graph.constant_rows import ConstantRows
from recmas_compiler.lowering.training_graph.frozen_states import FrozenStates, Places, Reading
from recmas_compiler.lowering.training_graph.padded_rows import Row
from recmas_runtime.engines.interface import behind_sink
from recmas_runtime.formats.messages import Carries, MessageForm, RowsOf, message_spans
from recmas_runtime.formats.plan import Message, Plan, PrefillStep, SendStep, Variant
from recmas_runtime.prompts.render import Tokens

Mode = Literal["teacher_forced", "rollout"]

_ByTurn = dict[tuple[str, int], list[Tensor]]
"""A tensor for each record, by agent (or link) and round."""

Sent = Tensor | str | tuple[Rows, ...]
"""What a record sends: vectors [M, D], a text, or pieces of rows."""

Received = dict[str, list[Sent]]
"""What a turn's slots get: by slot the message of each record."""


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


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Messages that are text in part, to begin with.

    Attributes:
        share: The part of each message, from its end, that is the embeddings of what it should say.
        said: Gives these embeddings [T, E] by link and record.
    """

    share: float
    said: Callable[[str, int], Tensor]


@dataclass(eq=False, kw_only=True)
class Latents:
    """Runs turns on a batch and keeps what they yield.

    Attributes:
        apply_link: Maps [..., in_dim] to [..., out_dim] by a link's id.
        frozen: What no link can change, of this batch and of earlier ones.
        note: Is told the vectors [N, E] of every link's messages.
        thoughts_MD: By agent and round, per record.
        turns_TD: By agent and round, per record: hidden states of a turn from the position before
            its first target token. Only in mode `teacher_forced`.
        texts: By agent and round, per record: what it wrote for others.
    """

    plan: Plan
    batch: Batch
    mode: Mode
    backbones: Mapping[str, TorchBackbone]
    agent_calls: Mapping[str, AgentCalls]
    writer: CallWriter
    apply_link: Callable[[str, Tensor], Tensor]
    frozen: FrozenStates
    taps: GradientTaps | None
    mix: Mix | None = None
    note: Callable[[str, Tensor], None] | None = None
    thoughts_MD: _ByTurn = field(default_factory=dict, init=False)
    turns_TD: _ByTurn = field(default_factory=dict, init=False)
    texts: dict[tuple[str, int], list[str]] = field(default_factory=dict, init=False)
    _ids: dict[tuple[str, int], list[tuple[int, ...]]] = field(default_factory=dict, init=False)
    _kept_rows: dict[tuple[str, int], list[tuple[Rows, ...]]] = field(
        default_factory=dict, init=False
    )
    _states_KD: _ByTurn = field(default_factory=dict, init=False)
    _inputs_MD: _ByTurn = field(default_factory=dict, init=False)
    _messages_ME: _ByTurn = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._constants: dict[str, ConstantRows] = {
            name: ConstantRows() for name in self.agent_calls
        }
        self._sent = sent_links(self.plan)

    def run(self, turns: Sequence[AgentTurn], *, whole: bool) -> None:
        """Run a batch of turns; those that send them messages must have run before.

        Args:
            turns: Of agents that share a backbone and take equally many latent steps.
            whole: Read targets to their end, not only as far as the agents think.
        """
        if thinking := [turn for turn in turns if self._any(turn, "needs_thoughts")]:
            self._think(thinking, whole=whole)
        if reading := [turn for turn in turns if self._links(turn, "context")]:
            self._read_prompts(reading)
        for turn in turns:
            if self._any(turn, "needs_text"):
                self._write(turn)
            if self._links(turn, "cache"):
                self._keep_rows(turn)

    def read_turns(
        self,
        turns: Sequence[AgentTurn],
        *,
        limit: int | None = None,
        received: Received | None = None,
        count: int | None = None,
    ) -> dict[AgentTurn, list[Tensor]]:
        """Read prompts and targets; return what `turns_TD` describes, by turn.

        Args:
            limit: Read so many tokens of the targets only.
            received: What the slots get in place of the records' own messages.
            count: Read so many of the first records only.
        """
        rows: list[Row] = []
        size = len(self.batch) if count is None else count
        for turn in turns:
            given = self.received(turn) if received is None else received
            calls = self._calls(turn, "turn", given)[:size]
            cut = [call if limit is None else call.cut(limit) for call in calls]
            rows += self._rows(turn, cut, given)
        name = self._backbone(turns[0].agent)
        hidden_NSD = self.agent_calls[name].read(rows, self._constants[name])
        states = [h_SD[-row.num_wanted :] for h_SD, row in zip(hidden_NSD, rows, strict=True)]
        return {turn: states[i * size : (i + 1) * size] for i, turn in enumerate(turns)}

    def message(self, link_id: str, round_: int) -> list[Tensor]:
        """Return a link's message [M, E] of a round, per record; its source must have run."""
        key = link_id, round_
        if key not in self._messages_ME:
            source = self.plan.links[link_id].source
            if self.plan.links[link_id].carries == "thoughts":
                inputs_MD = self._inputs(source, round_)
            else:
                inner = self.plan.agents[source].inner
                inputs_MD = self._map(inner, round_, self._states_KD[key])
            messages_ME = self._map(link_id, round_, inputs_MD)
            if self.note is not None:
                self.note(link_id, torch.cat(messages_ME[: self.batch.num_counted]))
            self._messages_ME[key] = self._mixed(link_id, messages_ME)
        return self._messages_ME[key]

    def _think(self, turns: Sequence[AgentTurn], *, whole: bool) -> None:
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

    def _roll_out(self, turns: Sequence[AgentTurn], num_steps: int) -> None:
        rows: list[Row] = []
        for turn in turns:
            received = self.received(turn)
            rows += self._rows(turn, self._calls(turn, "prompt", received), received)
        if any(row.front for row in rows) and len(rows) > 1:
            self._roll_out_alone(turns, rows, num_steps)
            return

        def inner(hidden_ND: Tensor) -> Tensor:
            parts_BD = torch.split(hidden_ND, len(self.batch))
            return torch.cat(
                [
                    self._linked(self.plan.agents[turn.agent].inner, turn.round, part_BD)
                    for turn, part_BD in zip(turns, parts_BD, strict=True)
                ]
            )

        name = self._backbone(turns[0].agent)
        thoughts_NMD, inputs_NMD = self.agent_calls[name].roll_out(
            rows, num_steps, inner, self._constants[name]
        )
        for i, turn in enumerate(turns):
            of_turn = slice(i * len(self.batch), (i + 1) * len(self.batch))
            self.thoughts_MD[turn.agent, turn.round] = list(thoughts_NMD[of_turn])
            self._inputs_MD[turn.agent, turn.round] = list(inputs_NMD[of_turn])

    def _roll_out_alone(
        self, turns: Sequence[AgentTurn], rows: Sequence[Row], num_steps: int
    ) -> None:
        """Roll out rows that run behind other ones, one by one."""
        size = len(self.batch)
        for i, turn in enumerate(turns):
            found = [
                self.agent_calls[self._backbone(turn.agent)].roll_out(
                    [row],
                    num_steps,
                    partial(self._linked, self.plan.agents[turn.agent].inner, turn.round),
                    ConstantRows(),
                )
                for row in rows[i * size : (i + 1) * size]
            ]
            key = turn.agent, turn.round
            self.thoughts_MD[key] = [thoughts_1MD[0] for thoughts_1MD, _ in found]
            self._inputs_MD[key] = [inputs_1MD[0] for _, inputs_1MD in found]

    def _keep_rows(self, turn: AgentTurn) -> None:
        """Read prompts and what stands behind them once more, for rows of their caches."""
        forms = {link_id: self.plan.links[link_id] for link_id in self._links(turn, "cache")}
        received = self.received(turn)
        calls = self._calls(turn, "prompt", received)
        agent_calls = self.agent_calls[self._backbone(turn.agent)]
        sent: dict[str, list[tuple[Rows, ...]]] = {link_id: [] for link_id in forms}
        key = turn.agent, turn.round
        for record, row in enumerate(self._rows(turn, calls, received)):
            first = row.num_before
            call = calls[record]
            assert call.placed is not None, "the prompt of an agent that hands it over"
            lengths = _vector_lengths(received, record)
            end = first + row.length
            behind: dict[RowsOf, tuple[int, ...] | Tensor] = {}
            if any("thoughts" in form.rows for form in forms.values()):
                # The last thought is not read any more.
                behind["thoughts"] = self._inputs(*key)[record][:-1]
            if any("written" in form.rows for form in forms.values()):
                behind["written"] = self._ids[key][record]
            pieces: dict[RowsOf, Rows] = {}
            for kind, piece in (behind or {"context": ()}).items():
                whole = replace(row, pieces=(*row.pieces, *((piece,) if len(piece) else ())))
                kept = agent_calls.rows_of(whole)
                pieces[kind] = cut_rows(kept, end, end + len(piece))
                beginnings: tuple[RowsOf, ...] = ("context", "prompt")
                for beginning in beginnings:
                    count = call.placed.num_rows(beginning, lengths)
                    pieces[beginning] = cut_rows(kept, first, first + count)
            for link_id, form in forms.items():
                sent[link_id].append(
                    tuple(replace(pieces[kind], seen_by=form.layers) for kind in form.rows)
                )
        for link_id, messages in sent.items():
            self._kept_rows[link_id, turn.round] = messages

    def _read_prompts(self, turns: Sequence[AgentTurn]) -> None:
        """Read prompts to their end, for messages of their own states."""
        readings: list[Reading] = []
        keys: list[tuple[str, int]] = []
        for turn in turns:
            received = self.received(turn)
            calls = self._calls(turn, "prompt", received)
            rows = self._rows(turn, calls, received)
            for link_id in self._links(turn, "context"):
                keys.append((link_id, turn.round))
                for record, (call, row) in enumerate(zip(calls, rows, strict=True)):
                    slots = _vector_lengths(received, record)
                    places = context_places(
                        call,
                        self.plan.links[link_id],
                        slots,
                        self.plan.agents[turn.agent].latent_steps,
                    )
                    whole = replace(row, num_wanted=row.length)
                    readings.append(Reading(row=whole, places=places))
        found = self.read(turns[0].agent, readings)
        size = len(self.batch)
        for i, key in enumerate(keys):
            self._states_KD[key] = found[i * size : (i + 1) * size]

    def _write(self, turn: AgentTurn) -> None:
        """Write for others: the target where it may be read and there is one, else greedily."""
        sent = self._sent[turn.agent, turn.round]
        most = max(self.plan.links[link].max_tokens or 0 for link in sent)
        received = self.received(turn)
        rows = self._rows(turn, self._calls(turn, "prompt", received), received)
        name = self._backbone(turn.agent)
        if self.mode == "teacher_forced" and turn.agent in self.batch.examples[0].targets:
            examples = self.batch.examples
            ids = [self.writer.written_ids(turn.agent, example, most) for example in examples]
        else:
            ids = self.frozen.write(name, self.agent_calls[name], rows, most, self._constants[name])
        key = turn.agent, turn.round
        self._ids[key] = ids
        self.texts[key] = [self.writer.text_of(turn.agent, written) for written in ids]
        if not self._links(turn, "written"):
            return
        readings = []
        for row, written in zip(rows, ids, strict=True):
            whole = replace(row, pieces=(*row.pieces, written), num_wanted=len(written))
            places = range(row.length, whole.length)
            readings.append(Reading(row=whole, places=tuple((place,) for place in places)))
        found = self.read(turn.agent, readings)
        for link_id in self._links(turn, "written"):
            self._states_KD[link_id, turn.round] = found

    def read(self, agent: str, readings: Sequence[Reading]) -> list[Tensor]:
        """Return what an agent's backbone reads, as `FrozenStates.read` does."""
        name = self._backbone(agent)
        return self.frozen.read(name, self.agent_calls[name], readings, self._constants[name])

    def received(self, turn: AgentTurn) -> Received:
        """Return the records' own messages for a turn; their sources must have run."""
        return {message.slot: self._sent_over(message) for message in turn.messages}

    def _sent_over(self, message: Message) -> list[Sent]:
        link = self.plan.links[message.link]
        if link.carries == "text":
            return list(self.texts[link.source, message.round])
        if link.carries == "cache":
            return list(self._kept_rows[message.link, message.round])
        return list(self.message(message.link, message.round))

    def _calls(self, turn: AgentTurn, form: Form, received: Received) -> list[Call]:
        """Return a turn's calls, with the texts that it receives in their slots."""
        calls = self.batch.calls[turn.agent, turn.variant, form]
        return [
            self.writer.write(turn.agent, turn.variant, form, example, texts) if texts else call
            for call, example, texts in zip(
                calls, self.batch.examples, self._texts(received), strict=True
            )
        ]

    def _texts(self, received: Received) -> Iterator[dict[str, str]]:
        """Yield the texts that each record receives, by slot."""
        for record in range(len(self.batch)):
            sent = {slot: messages[record] for slot, messages in received.items()}
            yield {slot: message for slot, message in sent.items() if isinstance(message, str)}

    def _rows(self, turn: AgentTurn, calls: Sequence[Call], received: Received) -> list[Row]:
        backbone = self.backbones[self._backbone(turn.agent)]
        rows = []
        for record, call in enumerate(calls):
            pieces: list[tuple[int, ...] | Tensor] = []
            for item in call.items:
                if isinstance(item, Tokens):
                    pieces.append(item.ids)
                    continue
                message = received[item.agent][record] if item.agent in received else ()
                if isinstance(message, Tensor) and len(message):
                    pieces.append(message)
            sent = [messages[record] for messages in received.values()]
            handed = [piece for message in sent if isinstance(message, tuple) for piece in message]
            before = behind_sink(handed)
            rows.append(
                Row(
                    pieces=tuple(pieces),
                    num_wanted=call.num_target_tokens + 1,
                    front=join_rows(before, backbone),
                    handed=seen_rows(before),
                )
            )
        return rows

    def _links(self, turn: AgentTurn, carries: Carries) -> list[str]:
        """Return the links of one kind over which a turn sends."""
        sent = self._sent.get((turn.agent, turn.round), ())
        return [link for link in sent if self.plan.links[link].carries == carries]

    def _any(self, turn: AgentTurn, need: str) -> bool:
        sent = self._sent.get((turn.agent, turn.round), ())
        return any(getattr(self.plan.links[link], need) for link in sent)

    def _backbone(self, agent: str) -> str:
        return self.plan.agents[agent].backbone

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

    def _mixed(self, link_id: str, messages_ME: list[Tensor]) -> list[Tensor]:
        """Put text in the place of the last part of each message, as the curriculum has it."""
        if self.mix is None or self.mix.share == 0:
            return messages_ME
        mixed = []
        for record, message_ME in enumerate(messages_ME):
            said_TE = self.mix.said(link_id, record).to(message_ME)
            num_kept = round((1 - self.mix.share) * len(message_ME))
            num_text = round(self.mix.share * len(said_TE))
            mixed.append(torch.cat([message_ME[:num_kept], said_TE[len(said_TE) - num_text :]]))
        return mixed


def _vector_lengths(received: Received, record: int) -> dict[str, int]:
    """Return how many positions vectors take in each slot."""
    sent = {slot: messages[record] for slot, messages in received.items()}
    return {slot: len(message) for slot, message in sent.items() if isinstance(message, Tensor)}


def sent_links(plan: Plan) -> dict[tuple[str, int], tuple[str, ...]]:
    """Return the links over which an agent sends in a round, by agent and round."""
    sent: dict[tuple[str, int], tuple[str, ...]] = {}
    for step in plan.steps:
        if isinstance(step, SendStep):
            key = step.source, step.round
            sent[key] = sent.get(key, ()) + step.links
    return sent


def context_places(
    call: Call, form: MessageForm, slots: Mapping[str, int], latent_steps: int
) -> Places:
    """Return the positions of a prompt that each vector of a message is the mean of.

    Args:
        slots: Positions that messages take in the prompt's slots.
        latent_steps: Of the sender.
    """
    assert call.placed is not None, "the prompt of an agent that hands it over"
    places = call.placed.context_positions(form.of, slots)
    spans = message_spans(form, len(places), latent_steps) if places else ()
    return tuple(tuple(places[begin:end]) for begin, end in spans)
