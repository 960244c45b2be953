"""Run any program IR eagerly in plain torch: the oracle for passes and engines.

Records run one by one, without padding, and agents of a batch one after the other: what a step
means is easier to see, and to trust, without the bookkeeping of a batch. The latent part keeps its
gradients, so that training can build on it.

Shape legend: T positions, M latent steps, D width of the agent, E width of a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from recmas_compiler.backbones.loaded.own_cache import cache_of, tensors_of
from recmas_compiler.backbones.torch_model import TorchBackbone, load_backbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.choose_layers import choose_layers
from recmas_compiler.lowering.materialize import materialize_links
from recmas_compiler.lowering.plan import agent_plan, build_plan
from recmas_compiler.lowering.torch_rows import Rows, cut_rows, extend, join_rows, seen_rows
from recmas_compiler.passes.remove_dead_steps import RemoveDeadSteps
from recmas_runtime.core.errors import fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.interface import HandedRows, behind_sink
from recmas_runtime.formats.layers import has_states
from recmas_runtime.formats.messages import MessageForm, RowsOf, message_spans
from recmas_runtime.formats.plan import (
    DecodeStep,
    PrefillStep,
    SamplingPlan,
    SendStep,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
)
from recmas_runtime.prompts.render import Chat, Prompt, Tokens, build_prompt, common_prefix
from recmas_runtime.prompts.sampler import Sampler
from recmas_runtime.prompts.tool_turns import answer_chat
from recmas_runtime.running.generation import DecoderSettings, RowDecoder, visible_specials
from recmas_runtime.running.record_prompts import field_of_slot, with_texts
from recmas_runtime.running.records import FinishReason
from recmas_runtime.sequences.messages import compared_links, sends_rows

Record = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class RecordResult:
    """One record's way through a system, its values as in `ReferenceResult` but without B."""

    messages: dict[str, Tensor]
    handover_texts: dict[str, str]
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
            width. Text and rows do not appear, nor messages of rounds that not every record ran.
            Where records decide M, shorter messages are filled up with NaN.
        handover_texts: Per record, by `SOURCE->TARGET@ROUND`, what one agent wrote for another.
        thoughts: By `AGENT@ROUND`, each [B, M, d], likewise.
        token_ids: Per record, the answer without the token that ended it.
        texts: Without special tokens.
        rounds: Per record, how many rounds ran: less than the declared ones after an early end.
    """

    messages: dict[str, Tensor]
    handover_texts: list[dict[str, str]]
    thoughts: dict[str, Tensor]
    token_ids: list[list[int]]
    texts: list[str]
    finish_reasons: list[FinishReason]
    rounds: list[int]


# What one record sends over a link: vectors [M, E], a text, or pieces of rows.
Message = Tensor | str | tuple[Rows, ...]


@dataclass(kw_only=True)
class _Sequence:
    """An agent's cache while a record runs, and what its turn has left so far.

    Attributes:
        prefix: Of its last prompt up to the first slot: what a later one may reuse.
        hidden_11D: At the last position in the cache.
        states_TD: At the positions of the prompt.
        slots: How many positions vectors take in each slot of the prompt.
        front: The rows of others that come before the prompt.
        handed: Which layers see them.
        text: What it has written, and the states and rows of that.
    """

    cache: Any
    prefix: tuple[int, ...]
    hidden_11D: Tensor
    prompt: Prompt
    embeds_TD: Tensor
    states_TD: Tensor
    slots: dict[str, int]
    front: tuple[Tensor, ...] = ()
    handed: tuple[HandedRows, ...] = ()
    text: str = ""
    written_ND: Tensor | None = None
    rows: dict[RowsOf, Rows] = field(default_factory=dict)

    @property
    def num_front(self) -> int:
        """How many rows of others come before the prompt."""
        return self.front[0].shape[2] if self.front else 0

    @property
    def end(self) -> int:
        """Where the prompt ends in the cache."""
        return self.num_front + len(self.states_TD)


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
    messages: dict[tuple[str, int], Message] = field(default_factory=dict)
    converged_in: int | None = None

    def message(self, link: str, round_: int) -> Message:
        """Return the message of a round, or the latest one where an early end left it out."""
        if (link, round_) not in self.messages:
            rounds = [sent_in for sent, sent_in in self.messages if sent == link]
            round_ = max(sent_in for sent_in in rounds if sent_in < round_)
        return self.messages[link, round_]

    @property
    def messages_ME(self) -> dict[tuple[str, int], Tensor]:  # noqa: N802 (a shape)
        """The messages that are vectors."""
        return {key: sent for key, sent in self.messages.items() if isinstance(sent, Tensor)}


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

    def prompt(
        self, agent: str, variant: Variant, record: Record, texts: Mapping[str, str] | None = None
    ) -> Prompt:
        """Return an agent's prompt for a record as tokens and slots, texts in place of slots."""
        declared, given = self._agents[agent], texts or {}
        is_answer = agent == self.system.answer_agent
        chat = self._answer_chat if is_answer else self._chats[declared.backbone]
        return build_prompt(
            system=declared.system,
            prompt=with_texts(declared.parts(variant), given),
            record={**record, **{field_of_slot(slot): text for slot, text in given.items()}},
            chat=chat.template,
            tokenizer=chat.tokenizer,
            variables=declared.chat_template,
            placed=any(link.source == agent for link in self.plan.links.values()),
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
            handover_texts={
                f"{link}@{round_}": sent
                for (link, round_), sent in state.messages.items()
                if isinstance(sent, str)
            },
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
            case WriteStep():
                for agent in step.agents:
                    self._write(agent, step, state)
            case SendStep():
                self._send(step, state)
            case DecodeStep():
                raise AssertionError("a plan decodes once, at its end")

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
        received = {
            message.slot: state.message(message.link, message.round)
            for message in step.messages
            if message.agent == agent
        }
        texts = {slot: sent for slot, sent in received.items() if isinstance(sent, str)}
        vectors_ME = {slot: sent for slot, sent in received.items() if isinstance(sent, Tensor)}
        sent = [rows for each in received.values() if isinstance(each, tuple) for rows in each]
        pieces = behind_sink(sent)
        prompt = self.prompt(agent, variant, record, texts)
        embeds_TD = torch.cat(list(self._embedded(backbone, prompt, vectors_ME)))
        prefix = prompt.leading_ids
        layers = backbone.facts.layers
        front, handed = join_rows(pieces, backbone), seen_rows(pieces)
        cache, states_TD, kept = cache_of(layers, front), embeds_TD[:0], 0
        # States cannot be cropped, and a copy of them would be one more thing to trust.
        if step.reuse_prefix and not has_states(layers):
            sequence = state.sequences[agent]
            # The last position always runs: its hidden state is what comes next.
            kept = min(common_prefix(sequence.prefix, prefix), len(embeds_TD) - 1)
            cache, states_TD = sequence.cache, sequence.states_TD[:kept]
            cache.crop(kept - cache.get_seq_length())  # negative: how many rows to remove
        hidden_TD = extend(backbone, cache, embeds_TD[kept:], handed)
        state.sequences[agent] = _Sequence(
            cache=cache,
            prefix=prefix,
            hidden_11D=hidden_TD[None, -1:],
            prompt=prompt,
            embeds_TD=embeds_TD,
            states_TD=torch.cat([states_TD, hidden_TD]),
            slots={slot: len(vectors) for slot, vectors in vectors_ME.items()},
            front=front,
            handed=handed,
        )

    def _embedded(
        self, backbone: TorchBackbone, prompt: Prompt, vectors_ME: Mapping[str, Tensor]
    ) -> Iterator[Tensor]:
        for item in prompt.items:
            if isinstance(item, Tokens):
                yield backbone.embed(self._ids(item.ids))
            elif item.agent in vectors_ME:  # else the slot stays empty
                yield vectors_ME[item.agent]

    def _think(self, agent: str, step: ThinkStep, state: LatentState) -> None:
        backbone, sequence = self._backbone(agent), state.sequences[agent]
        inner = self.link(self.plan.agents[agent].inner)
        num_steps = self.plan.agents[agent].latent_steps
        thoughts_1D, embeds_1D = [sequence.hidden_11D[0]], [inner(sequence.hidden_11D[0])]
        for _ in range(num_steps - 1):
            hidden_1D = extend(backbone, sequence.cache, embeds_1D[-1], sequence.handed)
            thoughts_1D.append(hidden_1D)
            embeds_1D.append(inner(hidden_1D))
        sequence.hidden_11D = thoughts_1D[-1][None]
        state.thoughts_MD[agent, step.round] = torch.cat(thoughts_1D)
        if step.fused:
            state.embeds_MD[agent, step.round] = torch.cat(embeds_1D)
        if sends_rows(self.plan, agent, "thoughts"):
            end = sequence.end
            rows = tensors_of(sequence.cache, backbone.facts.layers)
            sequence.rows["thoughts"] = cut_rows(rows, end, end + num_steps - 1)

    @torch.no_grad()
    def _write(self, agent: str, step: WriteStep, state: LatentState) -> None:
        """Write a text behind the prompt; then read prompt and text once more for their states."""
        backbone, sequence = self._backbone(agent), state.sequences[agent]
        layers = backbone.facts.layers
        assert step.greedy, "hand-over texts of a latent plan are greedy"
        cache = cache_of(layers, sequence.front)
        hidden_TD = extend(backbone, cache, sequence.embeds_TD, sequence.handed)
        sampling = SamplingPlan(max_new_tokens=step.max_new_tokens or 1)
        ids, sequence.text, _ = self._text(
            agent, cache, hidden_TD[-1:], sampling, seed=0, handed=sequence.handed
        )
        if not step.keeps_states:
            return
        cache = cache_of(layers, sequence.front)
        whole_TD = torch.cat([sequence.embeds_TD, backbone.embed(self._ids(ids))])
        hidden_TD = extend(backbone, cache, whole_TD, sequence.handed)
        sequence.written_ND = hidden_TD[len(sequence.embeds_TD) :]
        if sends_rows(self.plan, agent, "written"):
            end = sequence.end
            rows = tensors_of(cache, layers)
            sequence.rows["written"] = cut_rows(rows, end, end + len(ids))

    def _send(self, step: SendStep, state: LatentState) -> None:
        form, sequence = self.plan.links[step.links[0]], state.sequences[step.source]
        match form.carries:
            case "text":
                sent: dict[str, Message] = dict.fromkeys(step.links, sequence.text)
            case "cache":
                sent = dict.fromkeys(step.links, self._rows_sent(step.source, form, sequence))
            case _:
                embeds_MD = self._mapped(step, form, state)
                sent = {link_id: self.link(link_id)(embeds_MD) for link_id in step.links}
        state.messages |= {(link_id, step.round): message for link_id, message in sent.items()}

    def _mapped(self, step: SendStep, form: MessageForm, state: LatentState) -> Tensor:
        """Return the inner link's results for the states that a message is made of, [M, D]."""
        key, sequence = (step.source, step.round), state.sequences[step.source]
        if not step.apply_inner:
            return state.embeds_MD[key]
        match form.carries:
            case "thoughts":
                states_MD = state.thoughts_MD[key]
            case "written":
                assert sequence.written_ND is not None, "the text's states are kept"
                states_MD = sequence.written_ND
            case _:
                places = sequence.prompt.context_positions(form.of, sequence.slots)
                steps = self.plan.agents[step.source].latent_steps
                means = [
                    sequence.states_TD[places[first:last]].mean(dim=0)
                    for first, last in message_spans(form, len(places), steps)
                ]
                states_MD = torch.stack(means) if means else sequence.states_TD[:0]
        mapped: Tensor = self.link(self.plan.agents[step.source].inner)(states_MD)
        return mapped

    def _rows_sent(self, agent: str, form: MessageForm, sequence: _Sequence) -> tuple[Rows, ...]:
        layers = self._backbone(agent).facts.layers
        first = sequence.num_front
        kinds = dict(sequence.rows)
        if form.needs_context:
            kind = form.rows[0]
            last = first + sequence.prompt.num_rows(kind, sequence.slots)
            kinds[kind] = cut_rows(tensors_of(sequence.cache, layers), first, last)
        return tuple(replace(kinds[kind], seen_by=form.layers) for kind in form.rows)

    def _decode(
        self, state: LatentState, sampling: SamplingPlan, *, seed: int
    ) -> tuple[list[int], str, FinishReason]:
        """Return the answer's ids, its text and why it ended."""
        agent = self.plan.answer_agent
        sequence = state.sequences[agent]
        return self._text(
            agent,
            sequence.cache,
            sequence.hidden_11D[0],
            sampling,
            seed=seed,
            handed=sequence.handed,
        )

    def _text(
        self,
        agent: str,
        cache: Any,
        hidden_1D: Tensor,
        sampling: SamplingPlan,
        *,
        seed: int,
        handed: Sequence[HandedRows],
    ) -> tuple[list[int], str, FinishReason]:
        """Write behind what is in a cache, whose last position has the given state."""
        backbone = self._backbone(agent)
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
            logits_1V = backbone.logits(hidden_1D)
            chosen = int(sampler.choose(logits_1V.float().cpu().numpy())[0])
            writer.push(chosen)
            if chosen not in backbone.eos_token_ids:
                ids.append(chosen)
            if writer.finish_reason is not None:
                return ids, writer.text, writer.finish_reason
            hidden_1D = extend(backbone, cache, backbone.embed(self._ids([chosen])), handed)
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
    remote = [name for name in system.agents if system.is_remote(name)]
    if remote:
        raise fail(
            "RM129",
            f"`{remote[0]}` runs on a model behind an API, whose weights are not here to be run in "
            "torch",
            hint="Give the agent a backbone, or build the spec and run the bundle.",
        )
    used = {system.backbone_of(agent).name: system.backbone_of(agent) for agent in system.agents}
    return {
        name: load_backbone(b.facts, progress=progress, dtype=b.dtype, template=b.template)
        for name, b in used.items()
    }


def gather(records: Sequence[RecordResult]) -> ReferenceResult:
    """Stack the results of single records into one."""
    return ReferenceResult(
        messages=_stack([record.messages for record in records]),
        handover_texts=[record.handover_texts for record in records],
        thoughts=_stack([record.thoughts for record in records]),
        token_ids=[record.token_ids for record in records],
        texts=[record.text for record in records],
        finish_reasons=[record.finish_reason for record in records],
        rounds=[record.rounds for record in records],
    )


def _stack(records: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    first = records[0] if records else {}
    names = [name for name in first if all(name in record for record in records)]
    return {
        name: pad_sequence(
            [record[name] for record in records], batch_first=True, padding_value=torch.nan
        )
        for name in names
    }


def module_name(link_id: str) -> str:
    """Return a link's name as a submodule; such names must not hold a dot."""
    return link_id.replace(".", ":")
