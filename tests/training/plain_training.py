"""The training loss written down as its meaning reads: one record, no padding, no cache, no batch.

Rendering and tokenizing are Hugging Face's own. Nothing is shared with the training graph but the
backbones, the links and the declared topology.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent
from recmas_compiler.lowering.training_graph.calls import TrainExample

WORD = "assistanttext"
SLOT = r"\[\[slot ([^\]]+)\]\]"


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
    last_slots: Mapping[str, Tensor] | None = None
    messages: dict[tuple[str, int], Tensor] = field(default_factory=dict)

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
                if system.agents[name].latent_steps == 0:
                    continue
                seen = self._seen(name, round_)
                if name == system.answer_agent and self.weight:
                    earlier.append(self._cross_entropy(name, *self._read(name, example, seen)))
                self._send(name, round_, self._thoughts(name, example, seen))
        raise AssertionError("no answer")

    def _thoughts(
        self, name: str, example: TrainExample, seen: Mapping[str, Tensor | None]
    ) -> Tensor:
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

    def _send(self, name: str, round_: int, thoughts: Tensor) -> None:
        for link in self.topology.system.links.values():
            if link.source == name:
                inputs = self.links[f"{name}.inner"](thoughts)
                self.messages[link.id, round_] = self.links[link.id](inputs)

    def _seen(self, name: str, round_: int) -> dict[str, Tensor | None]:
        """Return the message of each slot; None where none was sent yet."""
        seen: dict[str, Tensor | None] = {}
        for link in self.topology.system.links.values():
            if link.target == name:
                sent = round_ - 1 if link.feedback else round_
                empty = torch.zeros(0, link.weights.out_dim) if sent > 0 else None
                seen[link.source] = self.messages.get((link.id, sent), empty)
        return seen

    def _read(
        self, name: str, example: TrainExample, seen: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, list[int]]:
        """Return hidden states over prompt and target, and the target's token ids."""
        agent = self.topology.system.agents[name]
        pieces, target_ids = self._pieces(agent, example, seen, target=example.targets[name])
        return self._states(agent, self._embeds(agent, pieces, seen)), target_ids

    def _pieces(
        self,
        agent: Agent,
        example: TrainExample,
        seen: Mapping[str, Tensor | None],
        target: str | None,
    ) -> tuple[list[list[int] | str], list[int]]:
        """Return token ids and names of slots in turn, and the target's ids."""
        tokenizer = self._backbone(agent).tokenizer
        is_first = agent.first is not None and any(
            seen.get(slot) is None for slot in agent.slots("then")
        )
        parts = agent.first if is_first and agent.first is not None else agent.then

        def text(parts: Sequence[object]) -> str:
            kinds = {
                "text": lambda value: value,
                "field": lambda value: str(example.fields[value]),
                "slot": lambda value: f"[[slot {value}]]",
            }
            return "".join(kinds[p.kind](p.value) for p in parts)  # type: ignore[attr-defined]

        chat = [{"role": "user", "content": text(parts)}]
        if agent.system:
            chat.insert(0, {"role": "system", "content": text(agent.system)})
        variables = {"enable_thinking": False, **agent.chat_template}
        prompt = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, **variables
        )
        if target is None:
            whole = prompt
        else:
            # The whole target is learned: templates that trim trim this word, not the target.
            answered = tokenizer.apply_chat_template(
                [*chat, {"role": "assistant", "content": WORD}], tokenize=False, **variables
            )
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

    def _embeds(
        self, agent: Agent, pieces: list[list[int] | str], seen: Mapping[str, Tensor | None]
    ) -> Tensor:
        backbone = self._backbone(agent)
        embeds = []
        for piece in pieces:
            if not isinstance(piece, str):
                embeds.append(backbone.embed(torch.tensor(piece)))
            elif (message := seen.get(piece)) is not None:
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
