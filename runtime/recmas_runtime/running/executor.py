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

from recmas_runtime.engines.interface import Backbone
from recmas_runtime.engines.onnx.backbone import Floats, Indices, LinkEngine, Operands
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.plan import (
    DecodeStep,
    Plan,
    PrefillStep,
    SamplingPlan,
    SendStep,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
    cache_capacity,
)
from recmas_runtime.prompts.render import Prompt, Slot, Tokens, common_prefix
from recmas_runtime.running.generation import Scribe, Voice
from recmas_runtime.running.record_prompts import PromptSource, prompt_positions, slots
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.running.sequence_batch import ROOM_FOR_TEXT, Lane
from recmas_runtime.tools.toolbox import Toolbox

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
    """Everything that computes, by id.

    Attributes:
        voices: By backbone.
    """

    backbones: Mapping[str, Backbone[Any]]
    link: LinkEngine
    operands: Mapping[str, Operands]
    voices: Mapping[str, Voice]
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
        plan: The plan.
        engines: Its engines.
        seeds: Of each record's random stream.
        sampling: How tokens are chosen.
        prompts: Builds the prompts.
        exchange: Give the answer agent, in the last round, the messages of the next record.
        toolbox: What the answer agent may call.
        messages: By link and round of sending, [B, M, d].
        texts: By agent and round, the text of each record that stands in for messages.
        settled: [B], the round after which a record's recursion ended early; 0 if it did not.
        events: What has run.
    """

    plan: Plan
    engines: Engines
    seeds: Sequence[int]
    sampling: SamplingPlan
    prompts: PromptSource
    exchange: bool = False
    toolbox: Toolbox | None = None
    messages: dict[tuple[str, int], Floats] = field(default_factory=dict)
    texts: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    settled: Indices = field(init=False)
    events: list[StepEvent] = field(default_factory=list)
    _lanes: dict[str, Lane] = field(default_factory=dict)
    _thoughts: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    _latest_round: int = 0

    def __post_init__(self) -> None:
        self.settled = np.zeros(self.num_records, np.int64)

    @property
    def num_records(self) -> int:
        """Records of the batch, B."""
        return len(self.seeds)

    def run_rounds(self) -> None:
        """Run every step before the decode; messages and events are kept on this object.

        A round's end is a possible exit: once every record is settled, the last round comes next.
        """
        for round_, steps in groupby(self.plan.steps[:-1], key=lambda step: step.round):
            is_last = round_ == self.plan.rounds
            if self.settled.all() and not is_last:
                continue
            for step in steps:
                self.events += self._run(step)
            if not is_last:
                self._settle(round_)
                self._latest_round = round_

    def answer(self) -> Scribe:
        """Return the writer of the answers, one for each record; the lane is then used up."""
        step = self.plan.steps[-1]
        assert isinstance(step, DecodeStep), "a plan ends with its decode"
        return Scribe(
            self._lanes[step.cache],
            voice=self._voice(step.agent),
            sampling=self.sampling,
            seeds=self.seeds,
            toolbox=self.toolbox,
            keeps_lane=False,
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
        """Run prompts into the lane; returns text tokens prefilled and reused, per record."""
        lane = self._lanes.get(step.cache) or self._new_lane(step.cache)
        batch = self.num_records
        sequences: list[Floats] = []
        prompts: list[Prompt] = []
        for agent, variant in zip(step.agents, step.variants, strict=True):
            for b in range(batch):
                texts = self._texts_for(agent, variant, step.round, b)
                prompts.append(self.prompts(b, agent, variant, texts))
                sequences.append(self._splice(lane.engine, agent, prompts[-1], step.round, b))
        leading = [prompt.leading_ids for prompt in prompts]
        other = self._lanes.get(step.prefix_from or "")
        if other is not None:  # else an early exit has left it out
            lane.begin_like(other, leading, [len(sequence) for sequence in sequences], batch)
        kept = [0] * len(prompts)
        if step.reuse_prefix or other is not None:
            kept = [
                # The last position is always recomputed: its hidden state is what comes next.
                min(common_prefix(before, now), len(sequence) - 1)
                for before, now, sequence in zip(lane.prefixes, leading, sequences, strict=True)
            ]
        lane.prefixes = leading
        lane.prefill(sequences, kept)
        counts = [prompt.num_tokens - count for prompt, count in zip(prompts, kept, strict=True)]
        return {
            "prefilled_tokens": tuple(sum(counts[b::batch]) for b in range(batch)),
            "reused_tokens": tuple(sum(kept[b::batch]) for b in range(batch)),
        }

    def _splice(
        self, engine: Backbone[Any], agent: str, prompt: Prompt, round_: int, b: int
    ) -> Floats:
        """Return one prompt's input embeddings [T, d], messages in their slots."""
        pieces: list[Floats] = []
        for item in prompt.items:
            match item:
                case Tokens(ids=ids):
                    pieces.append(engine.embed(np.array([ids], np.int64))[0])
                case Slot(agent=source):
                    pieces.append(self._message(source, agent, round_, b))
        return np.concatenate(pieces)

    def _message(self, source: str, target: str, round_: int, b: int) -> Floats:
        """Return the message [M, d] that `target` sees from `source` in this round."""
        if self.plan.agents[source].latent_steps == 0:
            width = self.engines.backbones[self.plan.agents[target].backbone].entry.width
            return np.zeros((0, width), np.float32)
        is_answer = target == self.plan.answer_agent and round_ == self.plan.rounds
        sender = (b + 1) % self.num_records if self.exchange and is_answer else b
        sent = self._sent_in(source, target, round_)
        message: Floats = self.messages[f"{source}->{target}", sent][sender]
        return message

    def _sent_in(self, source: str, target: str, round_: int) -> int:
        """Return the round in which was sent what `target` sees from `source` in this round."""
        if f"{source}->{target}" not in self.plan.feedback_links:
            return round_
        # After an early exit rounds are missing before the last one.
        return self._latest_round if round_ == self.plan.rounds else round_ - 1

    def _texts_for(self, agent: str, variant: Variant, round_: int, b: int) -> dict[str, str]:
        """Return by slot the texts that stand in an agent's prompt instead of messages."""
        texts = {}
        for source in slots(self.plan.agents[agent], variant):
            written = self.texts.get((source, self._sent_in(source, agent, round_)))
            if written is not None:
                texts[source] = written[b]
        return texts

    def _think(self, step: ThinkStep) -> None:
        lane = self._lanes[step.cache]
        if step.fused:
            thoughts, embeds = lane.engine.rollout(
                lane.cache, lane.thought, lane.next_embeds, lane.lengths, lane.inner, step.num_steps
            )
        else:
            thoughts, embeds = self._think_unfused(lane, len(step.agents), step.num_steps)
        batch = self.num_records
        for group, agent in enumerate(step.agents):
            rows = slice(group * batch, (group + 1) * batch)
            self._thoughts[agent] = thoughts[:, rows], embeds[:, rows]

    def _think_unfused(self, lane: Lane, groups: int, num_steps: int) -> tuple[Floats, Floats]:
        """Roll out with the inner link as a call of its own."""
        rows, _, width = lane.thought.shape
        position = lane.lengths.copy()
        thought, thoughts, embeds = lane.thought, [], []
        for step in range(num_steps):
            grouped = thought.reshape(groups, rows // groups, width)
            following = self.engines.link.apply(grouped, lane.inner).reshape(rows, 1, width)
            thoughts.append(thought[:, 0])
            embeds.append(following[:, 0])
            if step + 1 < num_steps:
                _, thought, _ = lane.engine.forward(
                    lane.cache, following, position, np.zeros(rows, np.int64), lane.inner
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
        scribe = Scribe(
            self._lanes[step.cache],
            voice=self._voice(step.agents[0]),
            sampling=structs.replace(
                self.sampling, max_new_tokens=step.max_new_tokens or self.sampling.max_new_tokens
            ),
            seeds=[
                seed + _SEEDS_OF_A_STEP * (place * len(self.plan.agents) + group)
                for group in range(len(step.agents))
                for seed in self.seeds
            ],
            toolbox=self.toolbox if step.agents == (self.plan.answer_agent,) else None,
            # The next round reads prompts behind what this one left.
            keeps_lane=True,
        )
        for _ in scribe.pieces():
            pass
        batch = self.num_records
        for group, agent in enumerate(step.agents):
            rows = scribe.writers[group * batch : (group + 1) * batch]
            self.texts[agent, step.round] = [writer.text for writer in rows]
        by_record = [scribe.writers[b::batch] for b in range(batch)]
        tokens: _Tokens = {
            "written_tokens": tuple(sum(w.num_tokens for w in ws) for ws in by_record),
            "cut_texts": tuple(sum(w.finish_reason == "length" for w in ws) for ws in by_record),
            "prefilled_tokens": tuple(sum(w.num_result_tokens for w in ws) for ws in by_record),
        }
        return tokens, tool_events(scribe, step.round, step.agents)

    def _settle(self, round_: int) -> None:
        """Find the records whose messages no longer change; what they are sent stays as it is."""
        if self.plan.stop_when is None:
            return
        sent = {link for link, sent_in in self.messages if sent_in == round_}
        for link in sent:
            for row in np.flatnonzero(self.settled):
                final = self.messages.get((link, int(self.settled[row])))
                if final is not None:
                    self.messages[link, round_][row] = final[row]
        compared = sent & {link for link, sent_in in self.messages if sent_in == round_ - 1}
        # The last round can only follow one that sent it everything it hears.
        if not compared or not self._heard_last() <= sent:
            return
        least = np.min(
            [mean_cosine(self.messages[k, round_], self.messages[k, round_ - 1]) for k in compared],
            axis=0,
        )
        self.settled[(self.settled == 0) & (least >= self.plan.stop_when.cosine)] = round_

    def _heard_last(self) -> set[str]:
        """Return the feedback links whose messages the last round awaits."""
        before_last = self.plan.rounds - 1
        sends = [step for step in self.plan.steps if isinstance(step, SendStep)]
        sent = {link for step in sends if step.round == before_last for link in step.links}
        return sent & set(self.plan.feedback_links)

    def _voice(self, agent: str) -> Voice:
        return self.engines.voices[self.plan.agents[agent].backbone]

    def _new_lane(self, cache_id: str) -> Lane:
        cache = self.plan.caches[cache_id]
        inner = [self.plan.agents[agent].inner for agent in cache.agents]
        self._lanes[cache_id] = lane = Lane.empty(
            self.engines.backbones[cache.backbone],
            self.engines.stacked(inner),
            rows=len(cache.agents) * self.num_records,
            capacity=self._capacity(cache_id),
        )
        return lane

    def _capacity(self, cache_id: str) -> int:
        """Return a capacity that holds what is known of this batch: attention pays for every row.

        Prompts that hold text still to be written, and text itself, get their room as they come.
        """
        longest, after = 0, 0
        for step in self.plan.steps:
            if isinstance(step, SendStep) or step.cache != cache_id:
                continue
            match step:
                case PrefillStep():
                    for agent, variant in zip(step.agents, step.variants, strict=True):
                        prompts = (
                            self.prompts(b, agent, variant, {}) for b in range(self.num_records)
                        )
                        positions = max(prompt_positions(self.plan, prompt) for prompt in prompts)
                        longest = max(longest, positions)
                case ThinkStep():
                    after = max(after, step.num_steps)
                case WriteStep() | DecodeStep():
                    most = min(self.sampling.max_new_tokens, ROOM_FOR_TEXT)
                    after = max(after, most)
        return cache_capacity(longest + after)


def tool_events(scribe: Scribe, round_: int, agents: tuple[str, ...]) -> list[StepEvent]:
    """Return what the tools took that a text called; nothing if it called none."""
    # Only the answer agent has tools, so rows are records.
    calls = [(row, r) for row, writer in enumerate(scribe.writers) for r in writer.results]
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
