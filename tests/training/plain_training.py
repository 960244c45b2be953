"""The training loss written down as its meaning reads: one record, no padding, no cache, no batch.

Rendering and tokenizing are Hugging Face's own. Nothing is shared with the training graph but the
backbones, the links and the declared topology.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Link
from recmas_compiler.lowering.training_graph.calls import TrainExample
from recmas_runtime.formats.messages import MessageForm

WORD = "assistanttext"
SLOT = r"\[\[slot ([^\]]+)\]\]"

Message = Tensor | str | None


@dataclass
class PlainTraining:
    """Computes the loss of one record at a time.

    Attributes:
        mode: `teacher_forced` or `rollout`.
        weight: Of earlier rounds, 0 for none.
        last_slots: Messages that the answer agent sees in the last round instead of its own.
    """

    topology: Graph
    backbones: Mapping[str, TorchBackbone]
    links: Mapping[str, nn.Module]
    mode: str
    weight: float = 0.0
    last_slots: Mapping[str, Message] | None = None
    messages: dict[tuple[str, int], Tensor | str] = field(default_factory=dict)

    def loss(self, example: TrainExample) -> tuple[Tensor, int]:
        """Return the summed loss and the number of target tokens."""
        self.messages = {}
        system = self.topology.system
        within_round = self.topology.without_feedback()
        needed = within_round.ancestors(system.answer_agent)
        earlier: list[Tensor] = []
        for round_ in range(1, system.rounds + 1):
            for name in within_round.order():
                last = round_ == system.rounds
                if last and name == system.answer_agent:
                    seen = self._seen(name, round_)
                    if self.last_slots is not None:
                        seen = {**seen, **self.last_slots}
                    states, ids = self._read(name, example, seen)
                    losses = self._cross_entropy(name, states, ids)
                    for sums in earlier:
                        losses = losses + self.weight / len(earlier) * sums
                    return losses, len(ids)
                if last and name not in needed:
                    continue
                if not system.sent_by(name):
                    continue
                seen = self._seen(name, round_)
                if name == system.answer_agent and self.weight:
                    earlier.append(self._cross_entropy(name, *self._read(name, example, seen)))
                for link in system.sent_by(name):
                    self._send(link, round_, example, seen)
        raise AssertionError("no answer")

    def _thoughts(self, name: str, example: TrainExample, seen: Mapping[str, Message]) -> Tensor:
        agent = self.topology.system.agents[name]
        if self.mode == "teacher_forced":
            states, ids = self._read(name, example, seen)
            return states[-len(ids) :][: agent.latent_steps]
        embeds = self._embeds(agent, self._pieces(agent, example, seen, target=None)[0], seen)
        thoughts = []
        for _ in range(agent.latent_steps):
            thoughts.append(self._states(agent, embeds)[-1])
            embeds = torch.cat([embeds, self.links[f"{name}.inner"](thoughts[-1])[None]])
        return torch.stack(thoughts)

    def _send(
        self, link: Link, round_: int, example: TrainExample, seen: Mapping[str, Message]
    ) -> None:
        name, form = link.source, link.form
        if form.carries == "thoughts":
            states = self._thoughts(name, example, seen)
        elif form.carries == "context":
            states = self._context(name, form, example, seen)
        else:
            agent = self.topology.system.agents[name]
            pieces, _ = self._pieces(agent, example, seen, target=None)
            ids = self._written(name, form, example, pieces, seen)
            if form.carries == "text":
                tokenizer = self._backbone(agent).tokenizer
                self.messages[link.id, round_] = tokenizer.decode(ids, skip_special_tokens=True)
                return
            embeds = self._embeds(agent, [*pieces, ids], seen)
            states = self._states(agent, embeds)[len(embeds) - len(ids) :]
        inputs = self.links[f"{name}.inner"](states)
        self.messages[link.id, round_] = self.links[link.id](inputs)

    def _context(
        self, name: str, form: MessageForm, example: TrainExample, seen: Mapping[str, Message]
    ) -> Tensor:
        """Return the states of an agent's prompt that a message is made of."""
        agent = self.topology.system.agents[name]
        pieces, _ = self._pieces(agent, example, seen, target=None)
        states = self._states(agent, self._embeds(agent, pieces, seen))
        whole, asked = (
            self._rendered(agent, example, seen, opens=opens) for opens in (True, False)
        )
        assert whole.startswith(asked)
        wanted = range(len(asked))
        if form.of is not None:
            field = str(example.fields[form.of])
            assert whole.count(field) == 1
            wanted = range(whole.index(field), whole.index(field) + len(field))
        places, position, at = [], 0, 0
        for i, piece in enumerate(re.split(SLOT, whole)):
            if i % 2:
                message = seen.get(piece)
                position += 0 if message is None else len(message)
                at += len(f"[[slot {piece}]]")
                continue
            encoded = self._backbone(agent).tokenizer(
                piece, add_special_tokens=False, return_offsets_mapping=True
            )
            for first, last in encoded.offset_mapping:
                if at + first in wanted or (at + first < wanted.start < at + last):
                    places.append(position)
                position += 1
            at += len(piece)
        assert position == len(states)
        chosen = states[places]
        if form.pool:
            count = min(agent.latent_steps, len(chosen))
            ends = [i * len(chosen) // count for i in range(count + 1)]
            return torch.stack([chosen[a:b].mean(0) for a, b in pairwise(ends)])
        return chosen.flip(0)[:: form.every].flip(0)

    def _written(
        self,
        name: str,
        form: MessageForm,
        example: TrainExample,
        pieces: list[list[int] | str],
        seen: Mapping[str, Message],
    ) -> list[int]:
        """Return the target's tokens, or those that are likeliest one by one."""
        agent = self.topology.system.agents[name]
        backbone = self._backbone(agent)
        if self.mode == "teacher_forced" and name in example.targets:
            encoded = backbone.tokenizer(example.targets[name], add_special_tokens=False)
            return list(encoded.input_ids[: form.max_tokens])
        ids: list[int] = []
        while len(ids) < form.max_tokens:
            states = self._states(agent, self._embeds(agent, [*pieces, ids], seen))
            chosen = int(backbone.logits(states[-1]).argmax())
            if chosen in backbone.eos_token_ids:
                break
            ids.append(chosen)
        return ids

    def _seen(self, name: str, round_: int) -> dict[str, Message]:
        """Return the message of each slot; None where none was sent yet."""
        seen: dict[str, Message] = {}
        for link in self.topology.system.links.values():
            if link.target == name:
                sent = round_ - 1 if link.feedback else round_
                width = self._backbone(self.topology.system.agents[name]).facts.width
                empty = torch.zeros(0, width) if sent > 0 else None
                seen[link.source] = self.messages.get((link.id, sent), empty)
        return seen

    def _read(
        self, name: str, example: TrainExample, seen: Mapping[str, Message]
    ) -> tuple[Tensor, list[int]]:
        """Return hidden states over prompt and target, and the target's token ids."""
        agent = self.topology.system.agents[name]
        pieces, target_ids = self._pieces(agent, example, seen, target=example.targets[name])
        return self._states(agent, self._embeds(agent, pieces, seen)), target_ids

    def _pieces(
        self,
        agent: Agent,
        example: TrainExample,
        seen: Mapping[str, Message],
        target: str | None,
    ) -> tuple[list[list[int] | str], list[int]]:
        """Return token ids and names of slots in turn, and the target's ids."""
        tokenizer = self._backbone(agent).tokenizer
        prompt = self._rendered(agent, example, seen)
        if target is None:
            whole = prompt
        else:
            # The whole target is learned: templates that trim trim this word, not the target.
            answered = self._rendered(agent, example, seen, opens=False, answer=WORD)
            assert answered.startswith(prompt)
            assert answered.count(WORD) == 1
            whole = answered.replace(WORD, target)
        pieces: list[list[int] | str] = []
        for i, piece in enumerate(re.split(SLOT, whole)):
            if i % 2:
                pieces.append(piece)
            elif piece:
                pieces.append(tokenizer(piece, add_special_tokens=False).input_ids)
        if target is None:
            return pieces, []
        # The tokens of the last piece that begin after its share of the prompt.
        last = re.split(SLOT, whole)[-1]
        boundary = len(re.split(SLOT, prompt)[-1])
        encoded = tokenizer(last, add_special_tokens=False, return_offsets_mapping=True)
        ids = [
            i
            for i, (first, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True)
            if first >= boundary
        ]
        return pieces, ids

    def _rendered(
        self,
        agent: Agent,
        example: TrainExample,
        seen: Mapping[str, Message],
        *,
        opens: bool = True,
        answer: str | None = None,
    ) -> str:
        """Return an agent's prompt as text, with words for slots that hold vectors."""
        is_first = agent.first is not None and any(
            seen.get(slot) is None for slot in agent.slots("then")
        )
        parts = agent.first if is_first and agent.first is not None else agent.then

        def in_slot(slot: str) -> str:
            message = seen.get(slot)
            return message if isinstance(message, str) else f"[[slot {slot}]]"

        def text(parts: Sequence[object]) -> str:
            kinds = {
                "text": lambda value: value,
                "field": lambda value: str(example.fields[value]),
                "slot": in_slot,
            }
            return "".join(kinds[p.kind](p.value) for p in parts)  # type: ignore[attr-defined]

        chat = [{"role": "user", "content": text(parts)}]
        if agent.system:
            chat.insert(0, {"role": "system", "content": text(agent.system)})
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        rendered: str = self._backbone(agent).tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=opens,
            **{"enable_thinking": False, **agent.chat_template},
        )
        return rendered

    def _embeds(
        self, agent: Agent, pieces: list[list[int] | str], seen: Mapping[str, Message]
    ) -> Tensor:
        backbone = self._backbone(agent)
        embeds = []
        for piece in pieces:
            if not isinstance(piece, str):
                embeds.append(backbone.embed(torch.tensor(piece, dtype=torch.long)))
            elif isinstance(message := seen.get(piece), Tensor):
                embeds.append(message)
        return torch.cat(embeds)

    def _states(self, agent: Agent, embeds: Tensor) -> Tensor:
        out = self._backbone(agent).body(inputs_embeds=embeds[None], use_cache=False)
        states: Tensor = out.last_hidden_state[0]
        return states

    def _cross_entropy(self, name: str, states: Tensor, ids: list[int]) -> Tensor:
        backbone = self._backbone(self.topology.system.agents[name])
        before = states[-len(ids) - 1 : -1]
        chances = torch.log_softmax(backbone.logits(before), dim=-1)
        return -chances[torch.arange(len(ids)), torch.tensor(ids)].sum()

    def _backbone(self, agent: Agent) -> TorchBackbone:
        identity = self.topology.system.backbones[agent.backbone].facts.identity
        by_identity = {b.facts.identity: b for b in self.backbones.values()}
        return by_identity[identity]
