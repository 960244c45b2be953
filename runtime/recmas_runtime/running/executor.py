"""The plan executor: one ragged batch through the flat step list.

Shape legend: B records, G agents of a step, R = G * B rows (agent-major), T positions of a whole
prompt, M latent steps, d width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypedDict

import numpy as np
from msgspec import structs

from recmas_runtime.engines.interface import Backbone, Floats, Indices, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.plan import (
    DecodeStep,
    Plan,
    PrefillStep,
    SamplingPlan,
    SendStep,
    Step,
    ThinkStep,
    WriteStep,
    cache_capacity,
    compared_links,
    slot_positions,
)
from recmas_runtime.prompts.render import Prompt, PromptSource, Tokens, common_prefix
from recmas_runtime.running.controls import MeanMessages
from recmas_runtime.running.generation import AnswerTools, DecoderSettings, TextGenerator
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.sequences.sequence_batch import DECODE_HEADROOM, SequenceBatch
from recmas_runtime.sequences.snapshots import Snapshots

# Streams of hand-over texts lie apart from those of answers, which are seeded `seed + index`.
_SEEDS_OF_A_STEP = 2**64


class _Tokens(TypedDict, total=False):
    """Tokens that a step dealt with, per record; the counts of `StepEvent`."""

    prefilled_tokens: tuple[int, ...]
    reused_tokens: tuple[int, ...]
    written_tokens: tuple[int, ...]
    cut_texts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Everything that computes, by id."""

    backbones: Mapping[str, Backbone[Any]]
    link: LinkEngine
    operands: Mapping[str, Operands]
    decoder_settings: Mapping[str, DecoderSettings]
    _stacked: dict[tuple[str, ...], Operands] = field(default_factory=dict, repr=False)

    def stacked(self, links: Sequence[str]) -> Operands:
        """Return the operands of several links as one; made once, so that bindings to them last."""
        key = tuple(links)
        if key not in self._stacked:
            self._stacked[key] = stack_operands([self.operands[link] for link in key])
        return self._stacked[key]


@dataclass(kw_only=True)
class Execution:
    """One batch on its way through the plan.

    Attributes:
        answer_prompts: The answer agent's in the last round, where they are of other records than
            `prompts`: their answers are then written from the messages of these.
        mean: Fills the answer agent's slots in the last round with the mean of other records.
        messages: By link and round of sending, [B, M, d].
        texts: By agent and round, the text of each record that stands in for messages.
        converged: [B], the round after which a record's recursion ended early; 0 if it did not.
    """

    plan: Plan
    engines: Engines
    seeds: Sequence[int]
    sampling: SamplingPlan
    prompts: PromptSource
    answer_prompts: PromptSource | None = None
    mean: MeanMessages | None = None
    tools: AnswerTools | None = None
    messages: dict[tuple[str, int], Floats] = field(default_factory=dict)
    texts: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    converged: Indices = field(init=False)
    events: list[StepEvent] = field(default_factory=list)
    _sequences: dict[str, SequenceBatch] = field(default_factory=dict)
    _thoughts: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.converged = np.zeros(self.num_records, np.int64)
        self._snapshots = Snapshots(
            plan=self.plan, prompts=self.prompts, num_records=self.num_records
        )
        self._compared = compared_links(self.plan) if self.plan.stop_when is not None else {}

    @property
    def num_records(self) -> int:
        """Records of the batch, B."""
        return len(self.seeds)

    def run_rounds(self) -> None:
        """Run every step before the decode; messages and events are kept on this object.

        A round's end is a possible exit: once every record has converged, the last round is next.
        """
        for round_, steps in groupby(self.plan.steps[:-1], key=lambda step: step.round):
            if self.converged.all() and round_ != self.plan.rounds:
                continue
            for step in steps:
                self.events += self._run(step)
            self._find_converged(round_)

    def received(self) -> list[dict[str, Floats]]:
        """Return by record the messages [M, d] for the answer agent's slots, after the rounds."""
        step = self._answer_step
        return [self._received(step, self.plan.answer_agent, b)[0] for b in range(self.num_records)]

    @property
    def answer_sequences(self) -> SequenceBatch:
        """The answer agent's sequences, one a record, prefilled for its answer."""
        return self._sequences[self._answer_step.cache]

    @property
    def _answer_step(self) -> PrefillStep:
        """The prefill of the answer itself, the last one."""
        return next(s for s in reversed(self.plan.steps) if isinstance(s, PrefillStep))

    def answer(self) -> TextGenerator:
        """Return what decodes the answers, one a record; their sequences are then used up."""
        return TextGenerator(
            self.answer_sequences,
            settings=self._decoder_settings(self.plan.answer_agent),
            sampling=self.sampling,
            seeds=self.seeds,
            tools=self.tools,
            keeps_sequences=False,
        )

    def _run(self, step: Step) -> list[StepEvent]:
        start = time.perf_counter()
        tokens: _Tokens = {}
        events: list[StepEvent] = []
        agents: tuple[str, ...]
        match step:
            case PrefillStep(agents=agents):
                tokens = self._prefill(step)
            case ThinkStep(agents=agents):
                self._think(step)
            case SendStep():
                agents = (step.source, *step.targets)
                self._send(step)
            case WriteStep(agents=agents):
                tokens, events = self._write(step)
            case DecodeStep():
                raise AssertionError("a plan decodes once, at its end")
        ms = (time.perf_counter() - start) * 1e3 - sum(event.ms for event in events)
        done = replace(StepEvent(op=step.op, round=step.round, agents=agents, ms=ms), **tokens)
        return [done, *events]

    def _prefill(self, step: PrefillStep) -> _Tokens:
        """Run prompts into their cache; returns text tokens prefilled and reused, per record."""
        sequences = self._sequences.get(step.cache) or self._new_sequences(step.cache)
        batch = self.num_records
        embeds: list[Floats] = []
        prompts: list[Prompt] = []
        for agent, variant in zip(step.agents, step.variants, strict=True):
            for b in range(batch):
                thoughts, texts = self._received(step, agent, b)
                if self.mean is not None and step is self._answer_step:
                    thoughts = {s: self.mean.of_others(s, own) for s, own in thoughts.items()}
                prompts.append(self._prompts_of(step)(b, agent, variant, texts))
                embeds.append(_splice(sequences.engine, prompts[-1], thoughts))
        leading = [prompt.leading_ids for prompt in prompts]
        other = self._sequences.get(step.prefix_from or "")  # None if an early exit left it out
        if sequences.keeps_states:
            kept = self._begin(step, sequences, other, leading, embeds)
        else:
            kept = self._kept_rows(step, sequences, other, leading, embeds)
        counts = [prompt.num_tokens - count for prompt, count in zip(prompts, kept, strict=True)]
        return {
            "prefilled_tokens": tuple(sum(counts[b::batch]) for b in range(batch)),
            "reused_tokens": tuple(sum(kept[b::batch]) for b in range(batch)),
        }

    def _kept_rows(
        self,
        step: PrefillStep,
        sequences: SequenceBatch,
        other: SequenceBatch | None,
        leading: Sequence[tuple[int, ...]],
        embeds: Sequence[Floats],
    ) -> list[int]:
        """Prefill prompts [T, d] behind rows that are there; returns how many of each are kept."""
        if other is not None:
            lengths = [len(row) for row in embeds]
            sequences.copy_shared_prefix(other, leading, lengths, self.num_records)
        kept = [0] * len(embeds)
        if step.reuse_prefix or other is not None:
            kept = [
                # The last position is always recomputed: its hidden state is what comes next.
                min(common_prefix(before, now), len(row) - 1)
                for before, now, row in zip(sequences.prefixes, leading, embeds, strict=True)
            ]
        sequences.prefixes = list(leading)
        sequences.prefill(embeds, kept)
        return kept

    def _begin(
        self,
        step: PrefillStep,
        sequences: SequenceBatch,
        other: SequenceBatch | None,
        leading: Sequence[tuple[int, ...]],
        embeds: Sequence[Floats],
    ) -> list[int]:
        """Prefill prompts [T, d] behind layer states that were saved; returns what is kept."""
        lengths = [len(row) for row in embeds]
        source = (other or sequences) if step.prefix_from is not None else sequences
        stops = self._snapshots.stops(step, leading, lengths)
        sequences.begin(self._snapshots.take(step, source, leading, lengths, stops), source)
        sequences.prefixes = list(leading)
        kept: list[int] = sequences.lengths.tolist()
        self._snapshots.keep(sequences.prefill(embeds, kept, stops))
        return kept

    def _received(
        self, step: PrefillStep, agent: str, b: int
    ) -> tuple[dict[str, Floats], dict[str, str]]:
        """Return what fills the slots of one prompt: messages [M, d], and texts, by slot."""
        thoughts: dict[str, Floats] = {}
        texts: dict[str, str] = {}
        for message in step.messages:
            if message.agent != agent:
                continue
            link = self.plan.links[message.link]
            if link.carries == "text":
                texts[message.slot] = self.texts[link.source, message.round][b]
            else:
                thoughts[message.slot] = self._sent(message.link, message.round)[b]
        return thoughts, texts

    def _prompts_of(self, step: PrefillStep) -> PromptSource:
        if self.answer_prompts is not None and step is self._answer_step:
            return self.answer_prompts
        return self.prompts

    def _sent(self, link: str, round_: int) -> Floats:
        """Return the message [B, M, d] of a round; of the latest one if an exit left it out."""
        if (link, round_) not in self.messages:
            rounds = [sent_in for sent, sent_in in self.messages if sent == link]
            round_ = max(sent_in for sent_in in rounds if sent_in < round_)
        return self.messages[link, round_]

    def _think(self, step: ThinkStep) -> None:
        sequences = self._sequences[step.cache]
        num_steps = self.plan.num_latent_steps(step)
        if step.fused:
            thoughts, embeds = sequences.engine.rollout(
                sequences.cache,
                sequences.thought,
                sequences.next_embeds,
                sequences.lengths,
                sequences.inner,
                num_steps,
            )
        else:
            thoughts, embeds = self._think_unfused(sequences, len(step.agents), num_steps)
        sequences.went_on(num_steps - 1)
        batch = self.num_records
        for group, agent in enumerate(step.agents):
            rows = slice(group * batch, (group + 1) * batch)
            self._thoughts[agent] = thoughts[:, rows], embeds[:, rows]

    def _think_unfused(
        self, sequences: SequenceBatch, groups: int, num_steps: int
    ) -> tuple[Floats, Floats]:
        """Roll out with the inner link as a call of its own."""
        rows, _, width = sequences.thought.shape
        position = sequences.lengths.copy()
        thought, thoughts, embeds = sequences.thought, [], []
        for step in range(num_steps):
            grouped = thought.reshape(groups, rows // groups, width)
            following = self.engines.link.apply(grouped, sequences.inner).reshape(rows, 1, width)
            thoughts.append(thought[:, 0])
            embeds.append(following[:, 0])
            if step + 1 < num_steps:
                _, thought, _ = sequences.engine.forward(
                    sequences.cache, following, position, np.zeros(rows, np.int64), sequences.inner
                )
                position += 1
        return np.stack(thoughts), np.stack(embeds)

    def _send(self, step: SendStep) -> None:
        thoughts_MBD, embeds_MBD = self._thoughts[step.source]
        num_steps, batch, width = thoughts_MBD.shape
        x = np.swapaxes(thoughts_MBD if step.apply_inner else embeds_MBD, 0, 1)
        x = np.ascontiguousarray(x).reshape(1, batch * num_steps, width)
        if step.apply_inner:
            inner = self.plan.agents[step.source].inner
            x = self.engines.link.apply(x, self.engines.stacked([inner]))
        outer = self.engines.stacked(step.links)
        x = np.ascontiguousarray(np.broadcast_to(x, (len(step.links), *x.shape[1:])))
        y = self.engines.link.apply(x, outer)
        for link, message in zip(step.links, y, strict=True):
            self.messages[link, step.round] = message.reshape(batch, num_steps, -1)

    def _write(self, step: WriteStep) -> tuple[_Tokens, list[StepEvent]]:
        """Write hand-over texts; returns tokens per record, and what the tools took."""
        place = self.plan.steps.index(step) + 1
        generator = TextGenerator(
            self._sequences[step.cache],
            settings=self._decoder_settings(step.agents[0]),
            sampling=structs.replace(
                self.sampling, max_new_tokens=step.max_new_tokens or self.sampling.max_new_tokens
            ),
            seeds=[
                seed + _SEEDS_OF_A_STEP * (place * len(self.plan.agents) + group)
                for group in range(len(step.agents))
                for seed in self.seeds
            ],
            tools=self.tools if step.agents == (self.plan.answer_agent,) else None,
            # The next round reads prompts behind what this one left.
            keeps_sequences=True,
        )
        for _ in generator.pieces():
            pass
        batch = self.num_records
        for group, agent in enumerate(step.agents):
            rows = generator.writers[group * batch : (group + 1) * batch]
            self.texts[agent, step.round] = [writer.text for writer in rows]
        by_record = [generator.writers[b::batch] for b in range(batch)]
        tokens: _Tokens = {
            "written_tokens": tuple(sum(w.num_tokens for w in ws) for ws in by_record),
            "cut_texts": tuple(sum(w.finish_reason == "length" for w in ws) for ws in by_record),
            "prefilled_tokens": tuple(sum(w.num_result_tokens for w in ws) for ws in by_record),
        }
        return tokens, tool_events(generator, step.round, step.agents)

    def _find_converged(self, round_: int) -> None:
        """Find the records whose messages no longer change; what they are sent stays as it is."""
        if self.plan.stop_when is None or round_ == self.plan.rounds:
            return
        for link in [link for link, sent_in in self.messages if sent_in == round_]:
            for row in np.flatnonzero(self.converged):
                final = self.messages.get((link, int(self.converged[row])))
                if final is not None:
                    self.messages[link, round_][row] = final[row]
        if round_ not in self._compared:
            return
        lowest = np.min(
            [
                mean_cosine(self.messages[link, round_], self.messages[link, round_ - 1])
                for link in self._compared[round_]
            ],
            axis=0,
        )
        has_converged = lowest >= self.plan.stop_when.cosine
        self.converged[(self.converged == 0) & has_converged] = round_

    def _decoder_settings(self, agent: str) -> DecoderSettings:
        return self.engines.decoder_settings[self.plan.agents[agent].backbone]

    def _new_sequences(self, cache_id: str) -> SequenceBatch:
        cache = self.plan.caches[cache_id]
        inner = [self.plan.agents[agent].inner for agent in cache.agents]
        self._sequences[cache_id] = sequences = SequenceBatch.empty(
            self.engines.backbones[cache.backbone],
            self.engines.stacked(inner),
            rows=len(cache.agents) * self.num_records,
            capacity=self._capacity(cache_id),
        )
        return sequences

    def _capacity(self, cache_id: str) -> int:
        """Return a capacity that holds what is known of this batch: attention pays for every row.

        Prompts that hold text still to be written, and text itself, get their room as they come.
        """
        longest, after = 0, 0
        slots = slot_positions(self.plan)
        for step in self.plan.steps:
            if isinstance(step, SendStep) or step.cache != cache_id:
                continue
            match step:
                case PrefillStep():
                    prompt = self._prompts_of(step)
                    for agent, variant in zip(step.agents, step.variants, strict=True):
                        filled = slots.get((agent, variant), {})
                        prompts = (prompt(b, agent, variant, {}) for b in range(self.num_records))
                        longest = max(longest, *(p.num_positions(filled) for p in prompts))
                case ThinkStep():
                    after = max(after, self.plan.num_latent_steps(step))
                case WriteStep() | DecodeStep():
                    most = min(self.sampling.max_new_tokens, DECODE_HEADROOM)
                    after = max(after, most)
        most = self.engines.backbones[self.plan.caches[cache_id].backbone].entry.max_positions
        return cache_capacity(min(longest + after, max(longest, most)))


def _splice(engine: Backbone[Any], prompt: Prompt, thoughts: Mapping[str, Floats]) -> Floats:
    """Return one prompt's input embeddings [T, d], messages in their slots."""
    pieces: list[Floats] = []
    for item in prompt.items:
        if isinstance(item, Tokens):
            pieces.append(engine.embed(np.array([item.ids], np.int64))[0])
        elif item.agent in thoughts:  # else the slot stays empty
            pieces.append(thoughts[item.agent])
    return np.concatenate(pieces)


def tool_events(generator: TextGenerator, round_: int, agents: tuple[str, ...]) -> list[StepEvent]:
    """Return what the tools took that a text called; nothing if it called none."""
    # Only the answer agent has tools, so rows are records.
    calls = [(row, r) for row, writer in enumerate(generator.writers) for r in writer.results]
    if not calls:
        return []
    ms = sum(result.ms for _, result in calls)
    return [StepEvent(op="tools", round=round_, agents=agents, ms=ms, tool_calls=tuple(calls))]


def mean_cosine(left_BMD: Floats, right_BMD: Floats) -> Floats:
    """Return for each record the mean over positions of the cosine between two messages [B]."""
    products = np.sum(left_BMD * right_BMD, axis=-1)
    norms = np.linalg.norm(left_BMD, axis=-1) * np.linalg.norm(right_BMD, axis=-1)
    cosines = products / np.maximum(norms, np.finfo(np.float32).tiny)
    return np.asarray(cosines.mean(axis=-1), np.float32)
