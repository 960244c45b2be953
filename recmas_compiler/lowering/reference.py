"""Run any program IR eagerly in plain torch: the oracle for passes and engines.

Records run one by one, without padding, and agents of a batch one after the other: what a step
means is easier to see, and to trust, without the bookkeeping of a batch. The latent part keeps its
gradients, so that training can build on it.

Shape legend: T positions, M latent steps, D width of the agent, E width of a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Decode, Level, Prefill, Send, StepOp, Think
from recmas_compiler.ir.routing import deliveries
from recmas_compiler.lowering.materialize import inner_link_id, materialize_links
from recmas_compiler.lowering.result import FinishReason, RecordResult, ReferenceResult, gather
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.formats.plan import SamplingPlan, Variant
from recmas_runtime.prompts.render import (
    Chat,
    Prompt,
    Slot,
    Tokens,
    build_prompt,
    common_prefix,
)
from recmas_runtime.prompts.sampler import Sampler, StopMatcher

Record = Mapping[str, object]


@dataclass(kw_only=True)
class _Lane:
    """An agent's cache while a record runs.

    Attributes:
        prefix: Token ids of its last prompt up to the first slot: what a later prompt may reuse.
        hidden_11D: Hidden state at the last position that ran.
    """

    cache: DynamicCache
    prefix: tuple[int, ...]
    hidden_11D: Tensor


@dataclass(kw_only=True)
class LatentState:
    """Where one record stands.

    Attributes:
        lanes: By agent.
        thoughts_MD: By (agent, round).
        embeds_MD: By (agent, round): R_k of the thoughts, where the steps computed it.
        messages_ME: By (link id, round of sending).
        settled_in: The round whose messages were those of the round before; the last round
            followed it. None if every round ran.
    """

    lanes: dict[str, _Lane] = field(default_factory=dict)
    thoughts_MD: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    embeds_MD: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    messages_ME: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    settled_in: int | None = None


class TorchSystem(nn.Module):
    """A program as a module: links are trainable parameters, backbones are frozen.

    Args:
        program: Of level UNROLLED or PLANNED, with or without any pass.
        backbones: By the name of the shared backbone.
        links: By link id.
    """

    def __init__(
        self,
        program: Graph,
        *,
        backbones: Mapping[str, TorchBackbone],
        links: Mapping[str, nn.Module],
    ) -> None:
        assert program.level >= Level.UNROLLED, "the reference runs programs"
        super().__init__()
        self.program = program
        self.system = program.system
        self.backbones = dict(backbones)
        self.frozen = nn.ModuleDict({name: b.model for name, b in backbones.items()})
        self.links = nn.ModuleDict({module_name(name): link for name, link in links.items()})
        self._chats = {
            name: Chat.load(b.tokenizer_json, b.chat_template, b.special_tokens)
            for name, b in backbones.items()
        }
        steps = [(step, op) for step, op in program.in_order() if not isinstance(op, Agent)]
        self._rounds = [(n, list(of_round)) for n, of_round in groupby(steps, lambda s: s[1].round)]
        self._arrivals = {
            step: deliveries(program, step) for step, op in steps if isinstance(op, Prefill)
        }
        self._exits = self._find_exits()
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the links; backbones always stay in eval mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def link(self, link_id: str) -> nn.Module:
        """Return a link by its id, such as `planner->solver` or `planner.inner`."""
        return self.links[module_name(link_id)]

    def prompt(self, agent: str, variant: Variant, record: Record) -> Prompt:
        """Return an agent's prompt for a record as tokens and slots."""
        declared = self.system.agents[agent]
        chat = self._chats[self.system.backbone_of(agent).name]
        parts = declared.first if variant == "first" else declared.then
        assert parts is not None, f"{agent} has no prompt {variant!r}"
        return build_prompt(
            system=declared.system,
            prompt=parts,
            record=record,
            chat=chat.template,
            tokenizer=chat.tokenizer,
            variables=declared.chat_template,
        )

    def forward(self, record: Record) -> LatentState:
        """Run every step of the program but the decode for one record, gradients kept.

        Once a round's messages no longer change, as `answer.stop_when` has it, the last round
        follows, with the messages of that round.
        """
        state = LatentState()
        for round_, steps in self._rounds:
            if state.settled_in is not None and round_ < self.system.rounds:
                continue
            for step, op in steps:
                self._run_step(step, op, record, state)
            if state.settled_in is None and self._is_settled(state, round_):
                state.settled_in = round_
        return state

    @torch.no_grad()
    def run(
        self, records: Iterable[Record], *, sampling: SamplingPlan | None = None
    ) -> ReferenceResult:
        """Answer records, one after the other.

        Tools are not run: a call in an answer's text stays a call.

        Args:
            records: Field values by name.
            sampling: How to choose tokens instead of the program's own way.
        """
        chosen = self.system.sampling if sampling is None else sampling
        return gather([self._run_record(i, record, chosen) for i, record in enumerate(records)])

    def _run_record(self, index: int, record: Record, sampling: SamplingPlan) -> RecordResult:
        state = self(record)
        ids, text, finish_reason = self._decode(state, sampling, seed=sampling.seed + index)
        return RecordResult(
            messages={f"{link}@{round_}": m for (link, round_), m in state.messages_ME.items()},
            thoughts={f"{agent}@{round_}": t for (agent, round_), t in state.thoughts_MD.items()},
            token_ids=ids,
            text=text,
            finish_reason=finish_reason,
            rounds=self.system.rounds if state.settled_in is None else state.settled_in + 1,
        )

    def _run_step(self, step: str, op: StepOp, record: Record, state: LatentState) -> None:
        match op:
            case Prefill():
                self._prefill(step, op, record, state)
            case Think():
                for agent in op.agents:
                    self._think(agent, op, state)
            case Send():
                self._send(op, state)
            case Decode():
                pass  # the last step; it needs the state of all others

    def _find_exits(self) -> dict[int, frozenset[str]]:
        """Return the links to compare after each round that the last round could follow."""
        heard: dict[int, set[str]] = {round_: set() for round_ in range(self.system.rounds + 1)}
        (answer,) = (s for _, steps in self._rounds for s, op in steps if isinstance(op, Decode))
        for step in self.program.ancestors(answer) & self._arrivals.keys():
            for found in self._arrivals[step]:
                heard[found.round].add(f"{found.slot}->{found.agent}")
        links, last = self.system.links, self.system.rounds
        awaited = {link for link in heard[last - 1] if links[link].feedback}
        return {
            round_: frozenset(heard[round_] & heard[round_ - 1])
            for round_ in range(2, last)
            if awaited <= heard[round_]
        }

    @torch.no_grad()
    def _is_settled(self, state: LatentState, round_: int) -> bool:
        """Tell whether the messages of a round are those of the round before, nearly."""
        stop, links = self.system.stop_when, self._exits.get(round_, frozenset())
        if stop is None or not links:
            return False
        cosines_M = (
            torch.cosine_similarity(
                state.messages_ME[link, round_], state.messages_ME[link, round_ - 1], dim=-1
            )
            for link in links
        )
        return all(cosine_M.mean().item() >= stop.cosine for cosine_M in cosines_M)

    def _prefill(self, step: str, op: Prefill, record: Record, state: LatentState) -> None:
        sent = {}
        for found in self._arrivals[step]:
            # After an early end rounds are missing before the last one.
            is_fed_back = found.round < op.round
            skipped_to = state.settled_in if op.round == self.system.rounds else None
            round_ = skipped_to if is_fed_back and skipped_to is not None else found.round
            sent[found.agent, found.slot] = (f"{found.slot}->{found.agent}", round_)
        for agent, variant in zip(op.agents, op.variants, strict=True):
            backbone = self._backbone(agent)
            prompt = self.prompt(agent, variant, record)
            pieces_TD: list[Tensor] = []
            for item in prompt.items:
                match item:
                    case Tokens(ids=ids):
                        pieces_TD.append(backbone.embed(self._ids(ids)))
                    case Slot(agent=source) if (agent, source) in sent:
                        pieces_TD.append(state.messages_ME[sent[agent, source]])
            embeds_1TD = torch.cat(pieces_TD)[None]
            prefix = prompt.leading_ids
            cache, kept = DynamicCache(), 0
            if op.reuse is not None:
                lane = state.lanes[agent]
                # The last position always runs: its hidden state is what comes next.
                kept = min(common_prefix(lane.prefix, prefix), embeds_1TD.shape[1] - 1)
                cache = lane.cache
                cache.crop(kept - cache.get_seq_length())  # negative: how many rows to remove
            hidden_11D = _extend(backbone, cache, embeds_1TD[:, kept:])
            state.lanes[agent] = _Lane(cache=cache, prefix=prefix, hidden_11D=hidden_11D)

    def _think(self, agent: str, op: Think, state: LatentState) -> None:
        backbone, lane = self._backbone(agent), state.lanes[agent]
        inner = self.link(inner_link_id(agent))
        thoughts_1D, embeds_1D = [lane.hidden_11D[0]], [inner(lane.hidden_11D[0])]
        for _ in range(op.num_steps - 1):
            lane.hidden_11D = _extend(backbone, lane.cache, embeds_1D[-1][None])
            thoughts_1D.append(lane.hidden_11D[0])
            embeds_1D.append(inner(lane.hidden_11D[0]))
        state.thoughts_MD[agent, op.round] = torch.cat(thoughts_1D)
        if op.fused:
            state.embeds_MD[agent, op.round] = torch.cat(embeds_1D)

    def _send(self, op: Send, state: LatentState) -> None:
        key = op.source, op.round
        if op.apply_inner:
            embeds_MD = self.link(inner_link_id(op.source))(state.thoughts_MD[key])
        else:
            embeds_MD = state.embeds_MD[key]
        for link_id in op.links:
            state.messages_ME[link_id, op.round] = self.link(link_id)(embeds_MD)

    def _decode(
        self, state: LatentState, sampling: SamplingPlan, *, seed: int
    ) -> tuple[list[int], str, FinishReason]:
        """Return the answer's ids, its text and why it ended."""
        agent = self.system.answer_agent
        backbone, lane = self._backbone(agent), state.lanes[agent]
        tokenizer = self._chats[self.system.backbone_of(agent).name].tokenizer
        sampler = Sampler(sampling, [seed])
        ids: list[int] = []
        while len(ids) < sampling.max_new_tokens:
            logits_1V = backbone.logits(lane.hidden_11D[0])
            chosen = int(sampler.choose(logits_1V.float().cpu().numpy())[0])
            if chosen in backbone.eos_token_ids:
                return ids, tokenizer.decode(ids), "stop"
            ids.append(chosen)
            stop = StopMatcher(sampling.stop)
            text = stop.push(tokenizer.decode(ids))
            if stop.stopped:
                return ids, text, "stop"
            lane.hidden_11D = _extend(
                backbone, lane.cache, backbone.embed(self._ids([chosen]))[None]
            )
        return ids, tokenizer.decode(ids), "length"

    def _backbone(self, agent: str) -> TorchBackbone:
        return self.backbones[self.system.backbone_of(agent).name]

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=next(self.parameters()).device)


def to_torch(
    program: Graph,
    *,
    backbones: Mapping[str, TorchBackbone] | None = None,
    links: Mapping[str, nn.Module] | None = None,
    progress: Progress | None = None,
) -> TorchSystem:
    """Lower a program to a torch module.

    Args:
        program: Of level UNROLLED or PLANNED.
        backbones: By the name of the shared backbone; loaded if not given.
        links: By link id; read or made as the program says if not given.
        progress: Sees loading and making.

    Raises:
        RecmasError: As `load_backbone` and `materialize_links` do.
    """
    watcher = Silent() if progress is None else progress
    loaded = load_backbones(program, progress=watcher) if backbones is None else backbones
    if links is None:
        made = materialize_links(program, loaded, progress=watcher)
        links = {link_id: link.module for link_id, link in made.items()}
    return TorchSystem(program, backbones=loaded, links=links)


def load_backbones(program: Graph, *, progress: Progress) -> dict[str, TorchBackbone]:
    """Load every backbone that a program's agents use, once each, by the shared name."""
    system = program.system
    used = {system.backbone_of(agent).name: system.backbone_of(agent) for agent in system.agents}
    return {
        name: load_backbone(b.facts, progress=progress, dtype=b.dtype) for name, b in used.items()
    }


def _extend(backbone: TorchBackbone, cache: DynamicCache, embeds_1TD: Tensor) -> Tensor:
    """Run positions behind those in the cache; return the last one's hidden state [1, 1, D]."""
    out = backbone.body(inputs_embeds=embeds_1TD, past_key_values=cache, use_cache=True)
    hidden_11D: Tensor = out.last_hidden_state[:, -1:]
    return hidden_11D


def module_name(link_id: str) -> str:
    """Return a link's name as a submodule; such names must not hold a dot."""
    return link_id.replace(".", ":")
