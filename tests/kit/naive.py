"""The numeric oracle: a topology run the way its meaning is written down, and no faster.

No passes, no cache, no plan: every latent step and every token recomputes the whole sequence.
Prompts go through Hugging Face's own template and tokenizer. Nothing here is shared with the
reference but the links and the weights: which message is seen, which prompt is used and when the
rounds end is stated here once more, in the words of the specs.

Shape legend: T positions, M latent steps, D width of the agent, E width of a target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Level
from recmas_compiler.lowering.reference import FinishReason, RecordResult, ReferenceResult, gather
from recmas_runtime.formats.plan import PromptPart

Record = Mapping[str, object]


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
        messages: dict[str, Tensor] = {}
        converged_in: int | None = None
        for round_ in range(1, system.rounds + 1):
            if converged_in is not None and round_ < system.rounds:
                continue
            for name in within_round.order():
                agent = system.agents[name]
                if round_ == system.rounds and name not in needed:
                    continue  # the answer agent itself decodes below
                if agent.latent_steps == 0:
                    continue  # says nothing, and nobody else sees its state
                embeds_TD = self._embed(agent, record, round_, messages, converged_in)
                thoughts_MD = self._think(agent, embeds_TD)
                thoughts[f"{name}@{round_}"] = thoughts_MD
                for link in system.links.values():
                    if link.source == name:
                        inner, outer = self.links[f"{name}.inner"], self.links[link.id]
                        messages[f"{link.id}@{round_}"] = outer(inner(thoughts_MD))
            if converged_in is None and self._has_converged(round_, messages, required):
                converged_in = round_
        answerer = system.agents[system.answer_agent]
        embeds_TD = self._embed(answerer, record, system.rounds, messages, converged_in)
        ids, finish_reason = self._decode(answerer, embeds_TD, max_new_tokens)
        return RecordResult(
            messages=messages,
            thoughts=thoughts,
            token_ids=ids,
            text=self._backbone(answerer).tokenizer.decode(ids, skip_special_tokens=True),
            finish_reason=finish_reason,
            rounds=system.rounds if converged_in is None else converged_in + 1,
        )

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
                is_sent = sent_in[slot] >= 1 and system.agents[slot].latent_steps > 0
                if is_sent and message not in required:
                    required.add(message)
                    turns.append((slot, sent_in[slot]))
        return required

    def _has_converged(
        self, round_: int, messages: Mapping[str, Tensor], required: set[str]
    ) -> bool:
        """Tell whether the messages of a round are those of the round before, nearly."""
        system = self.topology.system
        if system.stop_when is None or not 2 <= round_ < system.rounds:
            return False
        cosines: list[float] = []
        for link in system.links.values():
            now, before = f"{link.id}@{round_}", f"{link.id}@{round_ - 1}"
            if (
                link.feedback
                and f"{link.id}@{system.rounds - 1}" in required
                and now not in required
            ):
                return False  # the last round could not follow this one
            if now in required and before in required:
                cosine_M = torch.cosine_similarity(messages[now], messages[before], dim=-1)
                cosines.append(float(cosine_M.mean()))
        return bool(cosines) and min(cosines) >= system.stop_when.cosine

    def _sent_in(self, source: str, target: str, round_: int) -> int:
        """Return the round whose message `target` sees from `source`; below 1 for none."""
        feedback = self.topology.system.links[f"{source}->{target}"].feedback
        return round_ - 1 if feedback else round_

    def _embed(
        self,
        agent: Agent,
        record: Record,
        round_: int,
        messages: Mapping[str, Tensor],
        converged_in: int | None,
    ) -> Tensor:
        """Return the prompt's input embeddings [T, D] with the messages of this round in place."""
        backbone = self._backbone(agent)
        follows = converged_in if round_ == self.topology.system.rounds else None
        seen = {
            slot: self._message(slot, agent, round_, messages, follows)
            for slot in agent.slots("then")
        }
        is_first = agent.first is not None and any(m is None for m in seen.values())
        parts = agent.first if is_first and agent.first is not None else agent.then
        system_text = "".join(_text(part, record) for part in agent.system)
        user_text = "".join(_text(part, record) for part in parts)
        chat = [{"role": "system", "content": system_text}] if system_text else []
        rendered = backbone.tokenizer.apply_chat_template(
            [*chat, {"role": "user", "content": user_text}],
            tokenize=False,
            add_generation_prompt=True,
            **{"enable_thinking": False, **agent.chat_template},
        )
        pieces_TD: list[Tensor] = []
        # Splitting at a pattern with one group gives text, slot, text, slot, ..., text.
        for i, piece in enumerate(re.split(r"\[\[slot ([^\]]+)\]\]", rendered)):
            if i % 2 == 0 and piece:
                ids = backbone.tokenizer(piece, add_special_tokens=False).input_ids
                pieces_TD.append(backbone.embed(torch.tensor(ids, dtype=torch.long)))
            elif i % 2 == 1 and (message := seen.get(piece)) is not None:
                pieces_TD.append(message)
        return torch.cat(pieces_TD)

    def _message(
        self,
        source: str,
        agent: Agent,
        round_: int,
        messages: Mapping[str, Tensor],
        follows: int | None,
    ) -> Tensor | None:
        """Return the message [M, E] that `agent` sees this round, None if there is none yet.

        `follows` is the round before this one where rounds were skipped.
        """
        link = self.topology.system.links[f"{source}->{agent.name}"]
        sent_in = self._sent_in(source, agent.name, round_)
        if link.feedback and follows is not None:
            sent_in = follows
        if sent_in < 1:
            return None
        if self.topology.system.agents[source].latent_steps == 0:
            return torch.zeros(0, link.weights.out_dim)
        return messages[f"{link.id}@{sent_in}"]

    def _think(self, agent: Agent, embeds_TD: Tensor) -> Tensor:
        """Roll out from a prompt; return the thoughts [M, D]."""
        inner = self.links[f"{agent.name}.inner"]
        thoughts_D: list[Tensor] = []
        for _ in range(agent.latent_steps):
            h_D = self._last_hidden(agent, embeds_TD)
            thoughts_D.append(h_D)
            embeds_TD = torch.cat([embeds_TD, inner(h_D)[None]])
        return torch.stack(thoughts_D)

    def _decode(
        self, agent: Agent, embeds_TD: Tensor, max_new_tokens: int
    ) -> tuple[list[int], FinishReason]:
        backbone = self._backbone(agent)
        ids: list[int] = []
        while len(ids) < max_new_tokens:
            chosen = int(backbone.logits(self._last_hidden(agent, embeds_TD)).argmax())
            if chosen in backbone.eos_token_ids:
                return ids, "stop"
            ids.append(chosen)
            embeds_TD = torch.cat([embeds_TD, backbone.embed(torch.tensor([chosen]))])
        return ids, "length"

    def _last_hidden(self, agent: Agent, embeds_TD: Tensor) -> Tensor:
        """Run a whole sequence; return the hidden state [D] at its last position."""
        out = self._backbone(agent).body(inputs_embeds=embeds_TD[None], use_cache=False)
        hidden_D: Tensor = out.last_hidden_state[0, -1]
        return hidden_D

    def _backbone(self, agent: Agent) -> TorchBackbone:
        return self.backbones[self.topology.system.backbones[agent.backbone].facts.identity]


def _text(part: PromptPart, record: Record) -> str:
    match part.kind:
        case "text":
            return part.value
        case "field":
            name, bracket, index = part.value.partition("[")
            value = record[name]
            if bracket:  # one fact of several
                return str(value[int(index[:-1])])  # type: ignore[index]
            if isinstance(value, list | tuple):  # the choices of a question
                return "\n".join(f"{chr(ord('A') + i)}. {item}" for i, item in enumerate(value))
            return str(value)
        case "slot":
            return f"[[slot {part.value}]]"
