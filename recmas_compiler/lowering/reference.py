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
from typing import Any, Self

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.loaded.cache_argument import with_cache
from recmas_compiler.backbones.loaded.own_cache import empty_cache, positions_behind
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.choose_layers import choose_layers
from recmas_compiler.lowering.materialize import materialize_links
from recmas_compiler.lowering.plan import agent_plan, build_plan
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.plan import (
    DecodeStep,
    PrefillStep,
    SamplingPlan,
    SendStep,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
    compared_links,
)
from recmas_runtime.prompts.render import Chat, Prompt, Tokens, build_prompt, common_prefix
from recmas_runtime.prompts.sampler import Sampler
from recmas_runtime.prompts.tool_turns import answer_chat
from recmas_runtime.running.generation import DecoderSettings, RowDecoder, visible_specials
from recmas_runtime.running.records import FinishReason

Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class RecordResult:
    """One record's way through a system, its values as in `ReferenceResult` but without B."""

    messages: dict[str, Tensor]
    thoughts: dict[str, Tensor]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    rounds: int


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """All records of a run, in order.

    Attributes:
        messages: By `SOURCE->TARGET@ROUND`, rounds from 1, each [B, M, e] with e the target's
            width. Empty messages (of agents without latent steps) do not appear, nor those of
            rounds that not every record ran.
        thoughts: By `AGENT@ROUND`, each [B, M, d], likewise.
        token_ids: Per record, the answer without the token that ended it.
        texts: Without special tokens.
        rounds: Per record, how many rounds ran: less than the declared ones after an early end.
    """

    messages: dict[str, Tensor]
    thoughts: dict[str, Tensor]
    token_ids: list[list[int]]
    texts: list[str]
    finish_reasons: list[FinishReason]
    rounds: list[int]


@dataclass(kw_only=True)
class _Sequence:
    """An agent's cache while a record runs, and the hidden state at the last position in it."""

    cache: Any
    prefix: tuple[int, ...]  # of its last prompt up to the first slot: what a later one may reuse
    hidden_11D: Tensor


@dataclass(kw_only=True)
class LatentState:
    """Where one record stands.

    Attributes:
        embeds_MD: By (agent, round): R_k of the thoughts, where the steps computed it.
        converged_in: The round whose messages were those of the round before; the last round
            followed it. None if every round ran.
    """

    sequences: dict[str, _Sequence] = field(default_factory=dict)
    thoughts_MD: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    embeds_MD: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    messages_ME: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    converged_in: int | None = None

    def message(self, link: str, round_: int) -> Tensor:
        """Return the message of a round, or the latest one where an early end left it out."""
        if (link, round_) not in self.messages_ME:
            rounds = [sent_in for sent, sent_in in self.messages_ME if sent == link]
            round_ = max(sent_in for sent_in in rounds if sent_in < round_)
        return self.messages_ME[link, round_]


class ProgramModule(nn.Module):
    """A program as a module: links are trainable parameters, backbones are frozen.

    It follows the program's plan, as the runtime does, without the steps that the answer does not
    need.

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
        super().__init__()
        self.program = program
        self.system = program.system
        self.plan = build_plan(RemoveDeadSteps()(program))
        self.backbones = dict(backbones)
        self.frozen = nn.ModuleDict({name: b.model for name, b in backbones.items()})
        self.links = nn.ModuleDict({module_name(name): link for name, link in links.items()})
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the links; backbones always stay in eval mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def link(self, link_id: str) -> nn.Module:
        """Return a link by its id, such as `planner->solver` or `planner.inner`."""
        return self.links[module_name(link_id)]


class TorchSystem(ProgramModule):
    """Runs a program step by step, one record after the other."""

    def __init__(
        self,
        program: Graph,
        *,
        backbones: Mapping[str, TorchBackbone],
        links: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(program, backbones=backbones, links=links)
        self._chats = {
            name: Chat.load(
                b.tokenizer_json, b.chat_template, b.special_tokens, day=self.system.day
            )
            for name, b in backbones.items()
        }
        self._agents = {name: agent_plan(self.system, name) for name in self.system.agents}
        answerer = self._agents[self.system.answer_agent]
        self._answer_chat = answer_chat(self._chats, answerer, self.system.tools)
        self._compared = compared_links(self.plan)

    def prompt(self, agent: str, variant: Variant, record: Record) -> Prompt:
        """Return an agent's prompt for a record as tokens and slots."""
        declared = self._agents[agent]
        is_answer = agent == self.system.answer_agent
        chat = self._answer_chat if is_answer else self._chats[declared.backbone]
        return build_prompt(
            system=declared.system,
            prompt=declared.parts(variant),
            record=record,
            chat=chat.template,
            tokenizer=chat.tokenizer,
            variables=declared.chat_template,
        )

    def forward(self, record: Record) -> LatentState:
        """Run every step of the plan but the decode for one record, gradients kept.

        Once a round's messages no longer change, as `answer.stop_when` has it, the last round
        follows, with the messages of that round.
        """
        state = LatentState()
        for round_, steps in groupby(self.plan.steps[:-1], key=lambda step: step.round):
            if state.converged_in is not None and round_ < self.plan.rounds:
                continue
            for step in steps:
                self._run_step(step, record, state)
            if state.converged_in is None and self._has_converged(state, round_):
                state.converged_in = round_
        return state

    @torch.no_grad()
    def run(
        self, records: Iterable[Record], *, sampling: SamplingPlan | None = None
    ) -> ReferenceResult:
        """Answer records, one after the other.

        Tools are not run: a call in an answer's text stays a call.
        """
        chosen = self.plan.sampling if sampling is None else sampling
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
            rounds=self.plan.rounds if state.converged_in is None else state.converged_in + 1,
        )

    def _run_step(self, step: Step, record: Record, state: LatentState) -> None:
        match step:
            case PrefillStep():
                for agent, variant in zip(step.agents, step.variants, strict=True):
                    self._prefill(agent, variant, step, record, state)
            case ThinkStep():
                for agent in step.agents:
                    self._think(agent, step, state)
            case SendStep():
                self._send(step, state)
            case WriteStep() | DecodeStep():
                raise AssertionError("a latent plan writes text once, at its end")

    @torch.no_grad()
    def _has_converged(self, state: LatentState, round_: int) -> bool:
        """Tell whether the messages of a round are those of the round before, nearly."""
        stop = self.plan.stop_when
        if stop is None or round_ not in self._compared:
            return False
        cosines_M = (
            torch.cosine_similarity(
                state.messages_ME[link, round_], state.messages_ME[link, round_ - 1], dim=-1
            )
            for link in self._compared[round_]
        )
        return all(cosine_M.mean().item() >= stop.cosine for cosine_M in cosines_M)

    def _prefill(
        self, agent: str, variant: Variant, step: PrefillStep, record: Record, state: LatentState
    ) -> None:
        backbone = self._backbone(agent)
        prompt = self.prompt(agent, variant, record)
        received_ME = {
            message.slot: state.message(message.link, message.round)
            for message in step.messages
            if message.agent == agent
        }
        pieces_TD: list[Tensor] = []
        for item in prompt.items:
            if isinstance(item, Tokens):
                pieces_TD.append(backbone.embed(self._ids(item.ids)))
            elif item.agent in received_ME:  # else the slot stays empty
                pieces_TD.append(received_ME[item.agent])
        embeds_1TD = torch.cat(pieces_TD)[None]
        prefix = prompt.leading_ids
        layers = backbone.facts.layers
        cache, kept = empty_cache(layers), 0
        # States cannot be cropped, and a copy of them would be one more thing to trust.
        if step.reuse_prefix and not has_states(layers):
            sequence = state.sequences[agent]
            # The last position always runs: its hidden state is what comes next.
            kept = min(common_prefix(sequence.prefix, prefix), embeds_1TD.shape[1] - 1)
            cache = sequence.cache
            cache.crop(kept - cache.get_seq_length())  # negative: how many rows to remove
        hidden_11D = _extend(backbone, cache, embeds_1TD[:, kept:])
        state.sequences[agent] = _Sequence(cache=cache, prefix=prefix, hidden_11D=hidden_11D)

    def _think(self, agent: str, step: ThinkStep, state: LatentState) -> None:
        backbone, sequence = self._backbone(agent), state.sequences[agent]
        inner = self.link(self.plan.agents[agent].inner)
        thoughts_1D, embeds_1D = [sequence.hidden_11D[0]], [inner(sequence.hidden_11D[0])]
        for _ in range(self.plan.agents[agent].latent_steps - 1):
            sequence.hidden_11D = _extend(backbone, sequence.cache, embeds_1D[-1][None])
            thoughts_1D.append(sequence.hidden_11D[0])
            embeds_1D.append(inner(sequence.hidden_11D[0]))
        state.thoughts_MD[agent, step.round] = torch.cat(thoughts_1D)
        if step.fused:
            state.embeds_MD[agent, step.round] = torch.cat(embeds_1D)

    def _send(self, step: SendStep, state: LatentState) -> None:
        key = step.source, step.round
        if step.apply_inner:
            inner = self.link(self.plan.agents[step.source].inner)
            embeds_MD = inner(state.thoughts_MD[key])
        else:
            embeds_MD = state.embeds_MD[key]
        for link_id in step.links:
            state.messages_ME[link_id, step.round] = self.link(link_id)(embeds_MD)

    def _decode(
        self, state: LatentState, sampling: SamplingPlan, *, seed: int
    ) -> tuple[list[int], str, FinishReason]:
        """Return the answer's ids, its text and why it ended."""
        agent = self.plan.answer_agent
        backbone, sequence = self._backbone(agent), state.sequences[agent]
        tokenizer = self._chats[self.plan.agents[agent].backbone].tokenizer
        settings = DecoderSettings(
            tokenizer=tokenizer,
            eos_token_ids=frozenset(backbone.eos_token_ids),
            max_positions=backbone.facts.max_positions,
            num_rows=backbone.facts.vocab_size,
        )
        specials = visible_specials(tokenizer, sampling.stop)
        writer = RowDecoder(settings, sampling.stop, specials=specials)
        sampler = Sampler(sampling, [seed])
        ids: list[int] = []
        while len(ids) < sampling.max_new_tokens:
            logits_1V = backbone.logits(sequence.hidden_11D[0])
            chosen = int(sampler.choose(logits_1V.float().cpu().numpy())[0])
            writer.push(chosen)
            if chosen not in backbone.eos_token_ids:
                ids.append(chosen)
            if writer.finish_reason is not None:
                return ids, writer.text, writer.finish_reason
            sequence.hidden_11D = _extend(
                backbone, sequence.cache, backbone.embed(self._ids([chosen]))[None]
            )
        writer.finish("length")
        return ids, writer.text, "length"

    def _backbone(self, agent: str) -> TorchBackbone:
        return self.backbones[self.plan.agents[agent].backbone]

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
        backbones: By the name of the shared backbone; loaded if not given.
        links: By link id; read or made as the program says if not given.

    Raises:
        RecmasError: As `load_backbone` and `materialize_links` do.
    """
    watcher = Silent() if progress is None else progress
    loaded = load_backbones(program, progress=watcher) if backbones is None else backbones
    program, _ = choose_layers(program, loaded)
    if links is None:
        made = materialize_links(program, loaded, progress=watcher)
        links = {link_id: link.module for link_id, link in made.items()}
    return TorchSystem(program, backbones=loaded, links=links)


def load_backbones(program: Graph, *, progress: Progress) -> dict[str, TorchBackbone]:
    """Load every backbone that a program's agents use, once each, by the shared name."""
    system = program.system
    used = {system.backbone_of(agent).name: system.backbone_of(agent) for agent in system.agents}
    return {
        name: load_backbone(b.facts, progress=progress, dtype=b.dtype, template=b.template)
        for name, b in used.items()
    }


def gather(records: Sequence[RecordResult]) -> ReferenceResult:
    """Stack the results of single records into one."""
    return ReferenceResult(
        messages=_stack([record.messages for record in records]),
        thoughts=_stack([record.thoughts for record in records]),
        token_ids=[record.token_ids for record in records],
        texts=[record.text for record in records],
        finish_reasons=[record.finish_reason for record in records],
        rounds=[record.rounds for record in records],
    )


def _stack(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    first = records[0] if records else {}
    names = [name for name in first if all(name in record for record in records)]
    return {name: torch.stack([record[name] for record in records]) for name in names}


def _extend(backbone: TorchBackbone, cache: Any, embeds_1TD: Tensor) -> Tensor:
    """Run positions behind those in the cache; return the last one's hidden state [1, 1, D]."""
    positions = positions_behind(cache, embeds_1TD.shape[1])
    positions = {name: value.to(embeds_1TD.device) for name, value in positions.items()}
    out = backbone.body(inputs_embeds=embeds_1TD, **with_cache(backbone.body, cache), **positions)
    hidden_11D: Tensor = out.last_hidden_state[:, -1:]
    return hidden_11D


def module_name(link_id: str) -> str:
    """Return a link's name as a submodule; such names must not hold a dot."""
    return link_id.replace(".", ":")
