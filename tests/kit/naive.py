"""The numeric oracle: a topology run the way its meaning is written down, and no faster.

No passes, no cache, no plan: every latent step and every token recomputes the whole sequence, and
so does a prompt behind rows of other agents. Prompts go through Hugging Face's own template and
tokenizer. Nothing here is shared with the
reference but the links and the weights: which message is seen, which prompt is used and when the
rounds end is stated here once more, in the words of the specs.

Shape legend: T positions, M latent steps, D width of the agent, E width of a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kit.long_sequence import LongSequence, Piece
from kit.naive_prompt import NaivePrompt, Record, naive_prompt
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Level, Link
from recmas_compiler.lowering.reference import FinishReason, RecordResult, ReferenceResult, gather

# What one record sends over a link: vectors [M, E], a text, or rows.
Message = Tensor | str | tuple[Piece, ...]


@torch.no_grad()
def run_naive(
    topology: Graph,
    records: Iterable[Record],
    *,
    backbones: Mapping[str, TorchBackbone],
    links: Mapping[str, nn.Module],
    max_new_tokens: int,
) -> ReferenceResult:
    """Answer records greedily, one after the other.

    Args:
        topology: Agents and links as declared.
        records: Field values by name, as text that spells no control tokens.
        backbones: Those of the topology, under any names; they are told apart by identity.
        links: By link id.
        max_new_tokens: Most tokens of an answer.
    """
    assert topology.level is Level.TOPOLOGY, "the naive form runs what was declared"
    by_identity = {backbone.facts.identity: backbone for backbone in backbones.values()}
    naive = _Naive(topology=topology, backbones=by_identity, links=links)
    return gather([naive.run(record, max_new_tokens) for record in records])


@dataclass(kw_only=True)
class _Turn:
    """What an agent has of a round: its prompt, behind rows of others, and what it made of it."""

    agent: Agent
    prompt: NaivePrompt
    sequence: LongSequence
    num_before: int
    thoughts_MD: Tensor
    # The prompt with thoughts behind it, but for the last one; with what was written behind it.
    thinking: LongSequence
    writing: LongSequence | None = None
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class _Naive:
    topology: Graph
    backbones: Mapping[str, TorchBackbone]
    links: Mapping[str, nn.Module]

    def run(self, record: Record, max_new_tokens: int) -> RecordResult:
        system = self.topology.system
        within_round = self.topology.without_feedback()
        needed = within_round.ancestors(system.answer_agent)
        required = self._required()
        thoughts: dict[str, Tensor] = {}
        messages: dict[str, Message] = {}
        converged_in: int | None = None
        for round_ in range(1, system.rounds + 1):
            if converged_in is not None and round_ < system.rounds:
                continue
            for name in within_round.order():
                agent = system.agents[name]
                if round_ == system.rounds and name not in needed:
                    continue  # the answer agent itself decodes below
                links = [
                    link
                    for link in system.links.values()
                    if link.source == name and self._is_sent(link)
                ]
                if agent.latent_steps == 0 and not links:
                    continue  # says nothing, and nobody else sees its state
                turn = self._turn(agent, record, round_, messages, converged_in)
                if agent.latent_steps > 0:
                    thoughts[f"{name}@{round_}"] = turn.thoughts_MD
                for link in links:
                    messages[f"{link.id}@{round_}"] = self._message(link, turn)
            if converged_in is None and self._has_converged(round_, messages, required):
                converged_in = round_
        answerer = system.agents[system.answer_agent]
        prompt, before = self._prompt(answerer, record, system.rounds, messages, converged_in)
        sequence = LongSequence.behind(before, prompt.embeds_TD)
        ids, _, finish_reason = self._write(answerer, sequence, max_new_tokens)
        return RecordResult(
            messages={name: sent for name, sent in messages.items() if isinstance(sent, Tensor)},
            handover_texts={name: sent for name, sent in messages.items() if isinstance(sent, str)},
            thoughts=thoughts,
            token_ids=ids,
            text=self._backbone(answerer).tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=finish_reason,
            rounds=system.rounds if converged_in is None else converged_in + 1,
        )

    def _is_sent(self, link: Link) -> bool:
        steps = self.topology.system.agents[link.source].latent_steps
        return link.form.carries != "thoughts" or steps > 0

    def _required(self) -> set[str]:
        """Return `LINK@ROUND` of every message that the answer depends on, from its end back."""
        system = self.topology.system
        required: set[str] = set()
        turns = [(system.answer_agent, system.rounds)]
        while turns:
            name, round_ = turns.pop()
            slots = system.agents[name].slots("then")
            sent_in = {slot: self._sent_in(slot, name, round_) for slot in slots}
            if min(sent_in.values(), default=round_) < 1 and system.agents[name].first is not None:
                slots = system.agents[name].slots("first")
            for slot in slots:
                message = f"{slot}->{name}@{sent_in[slot]}"
                link = system.links[f"{slot}->{name}"]
                is_sent = sent_in[slot] >= 1 and self._is_sent(link)
                if is_sent and message not in required:
                    required.add(message)
                    turns.append((slot, sent_in[slot]))
        return required

    def _has_converged(
        self, round_: int, messages: Mapping[str, Message], required: set[str]
    ) -> bool:
        """Tell whether the thoughts of a round are those of the round before, nearly.

        Of other messages there need not be equally many in both, nor are texts and rows compared.
        """
        system = self.topology.system
        if system.stop_when is None or not 2 <= round_ < system.rounds:
            return False
        awaited = [
            link
            for link in system.links.values()
            if link.feedback and f"{link.id}@{system.rounds - 1}" in required
        ]
        if not all(f"{link.id}@{round_}" in required for link in awaited):
            return False  # the last round could not follow this one
        if all(link.form.carries != "thoughts" for link in awaited):
            return False  # nothing that goes from round to round can be compared
        cosines: list[float] = []
        for link in system.links.values():
            now, before = f"{link.id}@{round_}", f"{link.id}@{round_ - 1}"
            if link.form.carries == "thoughts" and {now, before} <= required:
                cosine_M = torch.cosine_similarity(messages[now], messages[before], dim=-1)
                cosines.append(float(cosine_M.mean()))
        return bool(cosines) and min(cosines) >= system.stop_when.cosine

    def _sent_in(self, source: str, target: str, round_: int) -> int:
        """Return the round whose message `target` sees from `source`; below 1 for none."""
        feedback = self.topology.system.links[f"{source}->{target}"].feedback
        return round_ - 1 if feedback else round_

    def _turn(
        self,
        agent: Agent,
        record: Record,
        round_: int,
        messages: Mapping[str, Message],
        converged_in: int | None,
    ) -> _Turn:
        """Run an agent in a round: its prompt, its thoughts and, behind the prompt, its text."""
        prompt, before = self._prompt(agent, record, round_, messages, converged_in)
        sequence = LongSequence.behind(before, prompt.embeds_TD)
        thinking, thoughts_MD = self._think(agent, sequence)
        turn = _Turn(
            agent=agent,
            prompt=prompt,
            sequence=sequence,
            num_before=len(sequence.members) - len(prompt.embeds_TD),
            thoughts_MD=thoughts_MD,
            thinking=thinking,
        )
        forms = [
            link.form for link in self.topology.system.links.values() if link.source == agent.name
        ]
        most = {form.max_tokens for form in forms if form.max_tokens is not None}
        if most:
            ids, turn.writing, _ = self._write(agent, sequence, *most)
            turn.text = self._backbone(agent).tokenizer.decode(ids, skip_special_tokens=True)
        return turn

    def _prompt(
        self,
        agent: Agent,
        record: Record,
        round_: int,
        messages: Mapping[str, Message],
        converged_in: int | None,
    ) -> tuple[NaivePrompt, list[Piece]]:
        """Return the prompt with the messages of this round in place, and the rows before it."""
        follows = converged_in if round_ == self.topology.system.rounds else None
        seen = {
            slot: self._seen(slot, agent, round_, messages, follows) for slot in agent.slots("then")
        }
        variant = "first" if any(message is None for message in seen.values()) else "then"
        slots = agent.slots(variant)
        prompt = naive_prompt(
            self._backbone(agent),
            agent,
            variant,
            record,
            {slot: sent for slot in slots if isinstance(sent := seen[slot], Tensor)},
            {slot: sent for slot in slots if isinstance(sent := seen[slot], str)},
        )
        rows = [sent for slot in slots if isinstance(sent := seen[slot], tuple)]
        pieces = [piece for sent in rows for piece in sent]
        if pieces and pieces[0].first > 0:
            # Rows that were computed behind others bring the first row of their sequence along.
            pieces.insert(0, replace(pieces[0], first=0, last=1))
        return prompt, pieces

    def _seen(
        self,
        source: str,
        agent: Agent,
        round_: int,
        messages: Mapping[str, Message],
        follows: int | None,
    ) -> Message | None:
        """Return the message that `agent` sees this round, None if there is none yet.

        `follows` is the round before this one where rounds were skipped.
        """
        link = self.topology.system.links[f"{source}->{agent.name}"]
        sent_in = self._sent_in(source, agent.name, round_)
        if link.feedback and follows is not None:
            sent_in = follows
        if sent_in < 1:
            return None
        if not self._is_sent(link):
            return torch.zeros(0, self._backbone(agent).facts.width)
        return messages[f"{link.id}@{sent_in}"]

    def _message(self, link: Link, turn: _Turn) -> Message:
        """Return what an agent sends over a link after its turn."""
        match link.form.carries:
            case "thoughts":
                states_ND = turn.thoughts_MD
            case "context":
                states_ND = self._context(link, turn)
            case "written":
                states_ND = self._states_behind(turn.writing, turn)
            case "text":
                return turn.text
            case "cache":
                assert link.form.layers is link.layer_share is None, "all layers see the same"
                return tuple(self._rows(kind, turn) for kind in link.form.rows)
        inner, outer = self.links[f"{link.source}.inner"], self.links[link.id]
        message: Tensor = outer(inner(states_ND))
        return message

    def _context(self, link: Link, turn: _Turn) -> Tensor:
        form, prompt = link.form, turn.prompt
        places = prompt.text_positions if form.of is None else prompt.fields.get(form.of, ())
        states_TD = turn.sequence.states(self._backbone(turn.agent))[turn.num_before :]
        if form.pool:
            count = min(turn.agent.latent_steps, len(places))
            means = [
                states_TD[list(places[i * len(places) // count : (i + 1) * len(places) // count])]
                for i in range(count)
            ]
            return torch.stack([m.mean(dim=0) for m in means]) if means else states_TD[:0]
        return states_TD[list(places[::-1][:: form.every][::-1])]

    def _states_behind(self, sequence: LongSequence | None, turn: _Turn) -> Tensor:
        assert sequence is not None, "the agent has written"
        return sequence.states(self._backbone(turn.agent))[len(turn.sequence.members) :]

    def _rows(self, kind: str, turn: _Turn) -> Piece:
        end = len(turn.sequence.members)
        match kind:
            case "context":
                last = turn.num_before + turn.prompt.num_turn
                return Piece(sequence=turn.sequence, first=turn.num_before, last=last)
            case "prompt":
                return Piece(sequence=turn.sequence, first=turn.num_before, last=end)
            case "thoughts":
                sequence = turn.thinking
            case _:
                assert turn.writing is not None, "the agent has written"
                sequence = turn.writing
        return Piece(sequence=sequence, first=end, last=len(sequence.members))

    def _think(self, agent: Agent, sequence: LongSequence) -> tuple[LongSequence, Tensor]:
        """Roll out; return what went through the backbone so far, and the thoughts [M, D]."""
        inner = self.links[f"{agent.name}.inner"]
        thoughts_D: list[Tensor] = []
        for _ in range(agent.latent_steps):
            if thoughts_D:
                sequence = sequence.grown(inner(thoughts_D[-1])[None])
            thoughts_D.append(self._last_hidden(agent, sequence))
        return sequence, torch.stack(thoughts_D) if thoughts_D else sequence.embeds_ND[:0]

    def _write(
        self, agent: Agent, sequence: LongSequence, max_new_tokens: int
    ) -> tuple[list[int], LongSequence, FinishReason]:
        """Write greedily; returns the tokens, what they stand behind with them, and the end."""
        backbone = self._backbone(agent)
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            chosen = int(backbone.logits(self._last_hidden(agent, sequence)).argmax())
            if chosen in backbone.eos_token_ids:
                return ids, sequence, "stop"
            ids.append(chosen)
            sequence = sequence.grown(backbone.embed(torch.tensor([chosen])))
        return ids, sequence, "length"

    def _last_hidden(self, agent: Agent, sequence: LongSequence) -> Tensor:
        """Return the hidden state [D] at the last position."""
        return sequence.states(self._backbone(agent))[-1]

    def _backbone(self, agent: Agent) -> TorchBackbone:
        return self.backbones[self.topology.system.backbones[agent.backbone].facts.identity]
