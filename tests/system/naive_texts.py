"""Baselines the straightforward way: Hugging Face's template, tokenizer and `generate`, no plan.

Every prompt is rendered from the declared graph and run from its first token. Only the counting of
prompt tokens knows of the rules that a prompt's beginning, where it is that of the same agent's
prompt before, is not run again, and that an agent's first prompt may begin like another agent's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent
from recmas_runtime.formats.plan import PromptPart

EMPTY = "[[nothing]]"
_BREAK = "[[break]]"
Turn = tuple[str, int]  # agent, round


@cache
def hugging_face(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a tiny backbone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@dataclass
class NaiveTexts:
    """Writes text on the backbones of a declared graph.

    Attributes:
        begins_like: By agent: others whose prompts its first one may begin like.
        prompt_tokens: Of all prompts so far.
        written: Tokens of every text so far, in order.
    """

    topology: Graph
    families: Path
    begins_like: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt_tokens: int = 0
    written: list[int] = field(default_factory=list)
    _seen: dict[str, list[int]] = field(default_factory=dict)

    def write(
        self,
        agent: str,
        user: str,
        record: Mapping[str, object],
        *,
        cap: int,
        reuse: bool = True,
        inserted: list[torch.Tensor] | None = None,
    ) -> str:
        """Return the greedy text after a prompt whose slots are filled as text, or are `EMPTY`.

        Args:
            agent: Who writes.
            user: The user's message.
            record: For the fields of the system text.
            cap: Most tokens.
            reuse: Whether a prefix that an earlier prompt of the agent began with is not counted.
            inserted: Embeddings [M, d] for each `EMPTY`, in order; nothing if None.
        """
        model, tokenizer = self._backbone(self.topology.system.agents[agent])
        embeds = self._embeds(agent, user, record, reuse=reuse, inserted=inserted)
        with torch.no_grad():
            ids = model.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                max_new_tokens=cap,
                do_sample=False,
                pad_token_id=0,
            )[0].tolist()
        self.written.append(len(ids))
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def losses(
        self,
        agent: str,
        user: str,
        record: Mapping[str, object],
        candidates: Sequence[str],
        *,
        inserted: list[torch.Tensor] | None = None,
    ) -> list[float]:
        """Return the negative log likelihood of texts behind a prompt, one forward pass each."""
        model, tokenizer = self._backbone(self.topology.system.agents[agent])
        before = self._embeds(agent, user, record, reuse=False, inserted=inserted)
        found = []
        for text in candidates:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
            embeds = torch.cat([before, model.get_input_embeddings()(ids)])
            with torch.no_grad():
                logits = model(inputs_embeds=embeds[None]).logits[0, len(before) - 1 : -1]
            found.append(float(cross_entropy(logits, ids, reduction="sum")))
        return found

    def _embeds(
        self,
        agent: str,
        user: str,
        record: Mapping[str, object],
        *,
        reuse: bool,
        inserted: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        declared = self.topology.system.agents[agent]
        model, tokenizer = self._backbone(declared)
        system = "".join(text_of(part, record) for part in declared.system)
        chat = [{"role": "system", "content": system}] if system else []
        rendered = tokenizer.apply_chat_template(
            [*chat, {"role": "user", "content": user}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        pieces = [
            [
                token
                for part in piece.split(_BREAK)
                for token in tokenizer(part, add_special_tokens=False).input_ids
            ]
            for piece in rendered.split(EMPTY)
        ]
        leading, total = pieces[0], sum(map(len, pieces))
        if not reuse:
            kept = 0
        elif agent in self._seen:
            kept = _common(self._seen[agent], leading)
        else:
            others = (self._seen[other] for other in self.begins_like.get(agent, ()))
            kept = max((_common(other, leading) for other in others), default=0)
            kept = kept if kept >= total / 4 else 0
        self._seen[agent] = leading
        self.prompt_tokens += total - min(kept, total - 1)
        embed = model.get_input_embeddings()
        embeds = [embed(torch.tensor(pieces[0], dtype=torch.long))]
        for index, piece in enumerate(pieces[1:]):
            if inserted is not None:
                embeds.append(inserted[index])
            embeds.append(embed(torch.tensor(piece, dtype=torch.long)))
        return torch.cat(embeds)

    def loop(self, record: Mapping[str, object], *, cap: int, answer_cap: int) -> str:
        """Answer with every agent writing text into the slots of the others, round by round."""
        system = self.topology.system
        needed = self._needed()
        texts: dict[Turn, str] = {}
        for round_ in range(1, system.rounds + 1):
            for name in self.topology.without_feedback().order():
                agent = system.agents[name]
                is_last = (name, round_) == (system.answer_agent, system.rounds)
                if (name, round_) not in needed:
                    continue
                parts = self._prompt(agent, round_)
                user = "".join(
                    self._heard(agent, part.value, round_, texts)
                    if part.kind == "slot"
                    else text_of(part, record)
                    for part in parts
                )
                text = self.write(name, user, record, cap=answer_cap if is_last else cap)
                if is_last:
                    return text
                texts[name, round_] = text
        raise AssertionError("nobody answered")

    def _heard(self, agent: Agent, slot: str, round_: int, texts: Mapping[Turn, str]) -> str:
        if self.topology.system.agents[slot].latent_steps == 0:
            return EMPTY
        text = texts[slot, self._sent_in(slot, agent, round_)]
        # Agents may well write what ends a turn or a thought; to others it is only text.
        _, tokenizer = self._backbone(agent)
        for control in tokenizer.get_added_vocab():
            text = text.replace(control, control[0] + _BREAK + control[1:])
        return text

    def _needed(self) -> set[Turn]:
        """Return the turns that the answer depends on."""
        system = self.topology.system
        found: set[Turn] = set()
        waiting = [(system.answer_agent, system.rounds)]
        while waiting:
            turn = waiting.pop()
            if turn in found:
                continue
            found.add(turn)
            agent = system.agents[turn[0]]
            for part in self._prompt(agent, turn[1]):
                if part.kind == "slot" and system.agents[part.value].latent_steps > 0:
                    waiting.append((part.value, self._sent_in(part.value, agent, turn[1])))
        return found

    def _prompt(self, agent: Agent, round_: int) -> tuple[PromptPart, ...]:
        slots = [part.value for part in agent.then if part.kind == "slot"]
        is_first = any(self._sent_in(slot, agent, round_) < 1 for slot in slots)
        return agent.first if is_first and agent.first is not None else agent.then

    def _sent_in(self, source: str, target: Agent, round_: int) -> int:
        link = self.topology.system.links[f"{source}->{target.name}"]
        return round_ - 1 if link.feedback else round_

    def _backbone(self, agent: Agent) -> tuple[Any, Any]:
        source = self.topology.system.backbones[agent.backbone].facts.source
        return hugging_face(self.families / source)


def text_of(part: PromptPart, record: Mapping[str, object]) -> str:
    """Return the text of a part that is no slot."""
    return part.value if part.kind == "text" else str(record[part.value])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda p: p[0] == p[1], zip(one, other, strict=False)))
