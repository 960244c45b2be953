"""The plan executor: one ragged batch through the flat step list.

Shape legend: B records, G agents of a step, R = G * B rows (agent-major), T positions of a whole
prompt, M latent steps, d width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from msgspec import structs

from recmas_runtime.engines.interface import Backbone, Floats, Indices, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.plan import (
    AskStep,
    CacheStep,
    DecodeStep,
    Plan,
    PrefillStep,
    PromptStep,
    SamplingPlan,
    SendStep,
    Step,
    ThinkStep,
    Variant,
    WriteStep,
    cache_capacity,
    slot_positions,
)
from recmas_runtime.prompts.render import ChatMessage, Prompt, PromptSource, common_prefix
from recmas_runtime.running.controls import MeanMessages
from recmas_runtime.running.generation import (
    AnswerTools,
    DecoderSettings,
    TextGenerator,
    draft_counts,
    tool_events,
)
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.scheduling.remote_calls import (
    RemoteAnswers,
    RemoteCalls,
    RemoteQuestion,
    Replies,
    questions_of,
)
from recmas_runtime.sequences.drafts import PromptLookup
from recmas_runtime.sequences.messages import (
    Messages,
    Received,
    StepCounts,
    Turn,
    compared_links,
    handed_counts,
    mean_cosine,
    sends_rows,
    sends_states,
    splice,
)
from recmas_runtime.sequences.sequence_batch import DECODE_HEADROOM, SequenceBatch
from recmas_runtime.sequences.snapshots import Snapshots

# Streams of hand-over texts lie apart from those of answers, which are seeded `seed + index`.
_SEEDS_OF_A_STEP = 2**64


StepListener = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Everything that computes, by id."""

    backbones: Mapping[str, Backbone[Any]]
    link: LinkEngine
    operands: Mapping[str, Operands]
    decoder_settings: Mapping[str, DecoderSettings]
    remotes: RemoteCalls = field(default_factory=RemoteCalls)
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
        messages: By link and round of sending, what each record sends, as `Messages` says.
        converged: [B], the round after which a record's recursion ended early; 0 if it did not.
        keeps_thoughts: Whether `thoughts` fills, for a trace; else each is dropped once it is sent.
        thoughts: By agent and round, the thoughts and their inner link's outputs, each [M, B, d].
        replies: By record, what remote models have told it.
        on_step: Is called before each step of the plan.
        clock: What times are told by, in seconds.
    """

    plan: Plan
    engines: Engines
    seeds: Sequence[int]
    sampling: SamplingPlan
    prompts: PromptSource
    answer_prompts: PromptSource | None = None
    mean: MeanMessages | None = None
    tools: AnswerTools | None = None
    messages: dict[tuple[str, int], Messages] = field(default_factory=dict)
    converged: Indices = field(init=False)
    events: list[StepEvent] = field(default_factory=list)
    keeps_thoughts: bool = False
    thoughts: dict[tuple[str, int], tuple[Floats, Floats]] = field(default_factory=dict)
    replies: Sequence[Replies] = ()
    on_step: StepListener | None = None
    clock: Callable[[], float] = time.perf_counter
    _sequences: dict[str, SequenceBatch] = field(default_factory=dict)
    _thoughts: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    _turns: dict[str, Turn] = field(default_factory=dict)
    _texts: dict[str, list[str]] = field(default_factory=dict)

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
                if self.on_step is not None:
                    self.on_step(step)
                self.events += self._run(step)
            self._find_converged(round_)

    def received(self) -> list[dict[str, Floats]]:
        """Return by record the messages [M, d] for the answer agent's slots, after the rounds."""
        step = self.plan.answer_prompt
        agent = self.plan.answer_agent
        return [self._received(step, agent, b).vectors for b in range(self.num_records)]

    @property
    def answer_sequences(self) -> SequenceBatch:
        """The answer agent's sequences, one a record, prefilled for its answer."""
        step = self.plan.answer_step
        assert isinstance(step, DecodeStep), "a remote model has no sequences"
        return self._sequences[step.cache]

    def answer(self) -> TextGenerator | RemoteAnswers:
        """Return what writes the answers, one a record; their sequences are then used up."""
        step = self.plan.answer_step
        if self.on_step is not None:
            self.on_step(step)
        if isinstance(step, AskStep):
            questions = self._questions(step)
            return self.engines.remotes.answers(questions, self.replies, clock=self.clock)
        return TextGenerator(
            self.answer_sequences,
            settings=self._decoder_settings(self.plan.answer_agent),
            sampling=self.sampling,
            seeds=self.seeds,
            tools=self.tools,
            keeps_sequences=False,
            lookups=self._lookups((self.plan.answer_agent,)),
            clock=self.clock,
        )

    def _questions(self, step: AskStep) -> list[RemoteQuestion]:
        """Return what agents ask; records whose recursion has ended ask nothing."""

        def messages(b: int, agent: str, variant: Variant) -> tuple[ChatMessage, ...]:
            texts = self._received(step, agent, b).texts
            return self._prompts_of(step)(b, agent, variant, texts).messages

        seeds = {b: s for b, s in enumerate(self.seeds) if self._runs(b, step.round)}
        return questions_of(step, self.plan, seeds, self.sampling, messages)

    def _ask(self, step: AskStep) -> StepCounts:
        """Have remote models write hand-over texts; returns what that took, per record."""
        told = self.engines.remotes.ask(self._questions(step), self.replies)
        rows = range(self.num_records)
        for agent in step.agents:
            self._texts[agent] = [told.text(b, agent) for b in rows]
        return {
            "cut_texts": tuple(told.num_cut(b) for b in rows),
            "texts": tuple(told.texts(b) for b in rows),
            "remote": tuple(told.uses(b) for b in rows),
        }

    def _run(self, step: Step) -> list[StepEvent]:
        start = self.clock()
        tokens: StepCounts = {}
        events: list[StepEvent] = []
        agents: tuple[str, ...]
        match step:
            case PrefillStep(agents=agents):
                tokens = self._prefill(step)
            case ThinkStep(agents=agents):
                self._think(step)
            case SendStep():
                agents = (step.source, *step.targets)
                tokens = self._send(step)
            case WriteStep(agents=agents):
                tokens, events = self._write(step)
            case AskStep(agents=agents):
                tokens = self._ask(step)
            case DecodeStep():
                raise AssertionError("a plan decodes once, at its end")
        ms = (self.clock() - start) * 1e3 - sum(event.ms for event in events)
        done = replace(StepEvent(op=step.op, round=step.round, agents=agents, ms=ms), **tokens)
        return [done, *events]

    def _prefill(self, step: PrefillStep) -> StepCounts:
        """Run prompts into their cache; returns text tokens prefilled and reused, per record."""
        sequences = self._sequences.get(step.cache) or self._new_sequences(step.cache)
        batch = self.num_records
        embeds: list[Floats] = []
        prompts: list[Prompt] = []
        received: list[Received] = []
        for agent, variant in zip(step.agents, step.variants, strict=True):
            for b in range(batch):
                received.append(self._received(step, agent, b))
                vectors = received[-1].vectors
                if self.mean is not None and step is self.plan.answer_prompt:
                    vectors = {s: self.mean.of_others(s, own) for s, own in vectors.items()}
                    received[-1].vectors = vectors
                prompts.append(self._prompts_of(step)(b, agent, variant, received[-1].texts))
                embeds.append(splice(sequences.engine, prompts[-1], vectors))
        leading = [prompt.leading_ids for prompt in prompts]
        other = self._sequences.get(step.prefix_from or "")  # None if an early exit left it out
        keep_hidden = any(sends_states(self.plan, agent) for agent in step.agents)
        if any(each.rows for each in received):
            kept = self._begin_behind(sequences, received, embeds, keep_hidden)
        elif sequences.keeps_states:
            kept = self._begin(step, sequences, other, leading, embeds, keep_hidden)
        else:
            kept = self._kept_rows(step, sequences, other, leading, embeds, keep_hidden)
        for group, agent in enumerate(step.agents):
            rows = slice(group * batch, (group + 1) * batch)
            self._turns[agent] = Turn(
                sequences=sequences,
                first_row=rows.start,
                prompts=prompts[rows],
                slots=[each.slots for each in received[rows]],
                embeds=embeds[rows] if sequences.keeps_states else [],
            )
        counts = [prompt.num_tokens - count for prompt, count in zip(prompts, kept, strict=True)]
        return {
            "prefilled_tokens": tuple(sum(counts[b::batch]) for b in range(batch)),
            "reused_tokens": tuple(sum(kept[b::batch]) for b in range(batch)),
        }

    def _begin_behind(
        self,
        sequences: SequenceBatch,
        received: Sequence[Received],
        embeds: Sequence[Floats],
        keep_hidden: bool,
    ) -> list[int]:
        """Prefill prompts [T, d] behind rows of other agents; returns what is kept: nothing."""
        sequences.take_rows([each.rows for each in received])
        behind = [
            np.concatenate([np.zeros((count, row.shape[1]), row.dtype), row])
            for count, row in zip(sequences.num_foreign, embeds, strict=True)
        ]
        # Nobody asks for the states of rows of others, but those of prompts stand behind them.
        sequences.hidden = [
            row[:count] for count, row in zip(sequences.num_foreign, behind, strict=True)
        ]
        sequences.prefill(behind, sequences.num_foreign, keep_hidden=keep_hidden)
        return [0] * len(embeds)

    def _kept_rows(
        self,
        step: PrefillStep,
        sequences: SequenceBatch,
        other: SequenceBatch | None,
        leading: Sequence[tuple[int, ...]],
        embeds: Sequence[Floats],
        keep_hidden: bool,
    ) -> list[int]:
        """Prefill prompts [T, d] behind rows that are there; returns how many of each are kept."""
        sequences.begin_own()
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
        sequences.prefill(embeds, kept, keep_hidden=keep_hidden)
        return kept

    def _begin(
        self,
        step: PrefillStep,
        sequences: SequenceBatch,
        other: SequenceBatch | None,
        leading: Sequence[tuple[int, ...]],
        embeds: Sequence[Floats],
        keep_hidden: bool,
    ) -> list[int]:
        """Prefill prompts [T, d] behind layer states that were saved; returns what is kept."""
        lengths = [len(row) for row in embeds]
        source = (other or sequences) if step.prefix_from is not None else sequences
        stops = self._snapshots.stops(step, leading, lengths)
        sequences.begin(self._snapshots.take(step, source, leading, lengths, stops), source)
        sequences.prefixes = list(leading)
        kept: list[int] = sequences.lengths.tolist()
        self._snapshots.keep(sequences.prefill(embeds, kept, stops, keep_hidden=keep_hidden))
        return kept

    def _received(self, step: PromptStep, agent: str, b: int) -> Received:
        """Return what fills the slots of one prompt, and what comes before it."""
        received = Received()
        for message in step.messages:
            if message.agent == agent:
                received.add(message.slot, self._sent(message.link, message.round)[b])
        return received

    def _prompts_of(self, step: PromptStep) -> PromptSource:
        if self.answer_prompts is not None and step is self.plan.answer_prompt:
            return self.answer_prompts
        return self.prompts

    def _sent(self, link: str, round_: int) -> Messages:
        """Return the messages of a round; of the latest one if an exit left it out."""
        if (link, round_) not in self.messages:
            rounds = [sent_in for sent, sent_in in self.messages if sent == link]
            round_ = max(sent_in for sent_in in rounds if sent_in < round_)
        return self.messages[link, round_]

    def _think(self, step: ThinkStep) -> None:
        sequences = self._sequences[step.cache]
        num_steps = self.plan.num_latent_steps(step)
        # Messages whose length the record decides may have taken the room that was planned.
        sequences.make_room(int(sequences.lengths.max()) + num_steps - 1)
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
        if step is self.plan.steps[-2]:
            sequences.stand_behind(thoughts[-1], embeds[-1], num_steps - 1)
        batch = self.num_records
        for group, agent in enumerate(step.agents):
            rows = slice(group * batch, (group + 1) * batch)
            self._thoughts[agent] = thoughts[:, rows], embeds[:, rows]
            if sends_rows(self.plan, agent, "thoughts"):
                # A text that is written next lies in the same place.
                self._turns[agent].keep_rows("thoughts", [num_steps - 1] * batch)
            if self.keeps_thoughts:
                self.thoughts[agent, step.round] = self._thoughts[agent]

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

    def _send(self, step: SendStep) -> StepCounts:
        form = self.plan.links[step.links[0]]
        match form.carries:
            case "thoughts":
                self._send_thoughts(step)
            case "text":
                self._keep(step, self._texts[step.source])
            case "cache":
                rows = self._turns[step.source].rows_sent(form)
                self._keep(step, rows)
                return handed_counts(rows, len(step.links))
            case "context" | "written":
                steps = self.plan.agents[step.source].latent_steps
                self._send_states(step, self._turns[step.source].states_sent(form, steps))
        return {}

    def _keep(self, step: SendStep, messages: Messages) -> None:
        self.messages |= {(link, step.round): messages for link in step.links}

    def _send_thoughts(self, step: SendStep) -> None:
        thoughts_MBD, embeds_MBD = self._thoughts[step.source]
        num_steps, batch, width = thoughts_MBD.shape
        x = np.swapaxes(thoughts_MBD if step.apply_inner else embeds_MBD, 0, 1)
        x = np.ascontiguousarray(x).reshape(batch * num_steps, width)
        y = self._through_links(step, x)
        for link, message in zip(step.links, y, strict=True):
            self.messages[link, step.round] = message.reshape(batch, num_steps, -1)

    def _send_states(self, step: SendStep, states: Sequence[Floats]) -> None:
        """Send the states [n, d] of each record; how many there are is its own matter."""
        y = self._through_links(step, np.concatenate(states))
        ends = np.cumsum([len(each) for each in states])[:-1]
        for link, message in zip(step.links, y, strict=True):
            self.messages[link, step.round] = np.split(message, ends)

    def _through_links(self, step: SendStep, x_ND: Floats) -> Floats:
        """Map vectors through the outer links of a step, and the inner one if it is due."""
        x = x_ND[None]
        if step.apply_inner:
            inner = self.plan.agents[step.source].inner
            x = self.engines.link.apply(x, self.engines.stacked([inner]))
        outer = self.engines.stacked(step.links)
        x = np.ascontiguousarray(np.broadcast_to(x, (len(step.links), *x.shape[1:])))
        return self.engines.link.apply(x, outer)

    def _write(self, step: WriteStep) -> tuple[StepCounts, list[StepEvent]]:
        """Write hand-over texts; returns tokens per record, and what the tools took."""
        place = self.plan.steps.index(step) + 1
        sequences = self._sequences[step.cache]
        batch = self.num_records
        if sequences.keeps_states:
            self._read_again(step)
        end = sequences.end
        generator = TextGenerator(
            self._sequences[step.cache],
            settings=self._decoder_settings(step.agents[0]),
            sampling=structs.replace(
                SamplingPlan() if step.greedy else self.sampling,
                max_new_tokens=step.max_new_tokens or self.sampling.max_new_tokens,
            ),
            seeds=[
                seed + _SEEDS_OF_A_STEP * (place * len(self.plan.agents) + group)
                for group in range(len(step.agents))
                for seed in self.seeds
            ],
            tools=self.tools if step.agents == (self.plan.answer_agent,) else None,
            # The next round reads prompts behind what this one left.
            keeps_sequences=True,
            lookups=self._lookups(step.agents),
        )
        for _ in generator.pieces():
            pass
        for group, agent in enumerate(step.agents):
            rows = generator.writers[group * batch : (group + 1) * batch]
            self._texts[agent] = [writer.text for writer in rows]
        if step.keeps_states:
            if sequences.keeps_states:
                self._read_again(step)
            sequences.end = end
            states = sequences.look_ahead(generator.written)
            for group, agent in enumerate(step.agents):
                rows_of = slice(group * batch, (group + 1) * batch)
                written = generator.written[rows_of]
                self._turns[agent].written = [
                    state[: len(ids)] for state, ids in zip(states[rows_of], written, strict=True)
                ]
                if sends_rows(self.plan, agent, "written"):
                    self._turns[agent].keep_rows("written", [len(ids) for ids in written])
        by_record = [generator.writers[b::batch] for b in range(batch)]
        tokens: StepCounts = {
            "written_tokens": tuple(sum(w.num_tokens for w in ws) for ws in by_record),
            "cut_texts": tuple(sum(w.finish_reason == "length" for w in ws) for ws in by_record),
            **draft_counts(generator, batch),
            "prefilled_tokens": tuple(sum(w.num_result_tokens for w in ws) for ws in by_record),
            "texts": tuple(
                tuple(w.text for w in ws) if self._runs(b, step.round) else ()
                for b, ws in enumerate(by_record)
            ),
        }
        return tokens, tool_events(generator, step.round, step.agents)

    def _read_again(self, step: WriteStep) -> None:
        """Run the prompts once more, from their beginning: layer states went on behind them."""
        sequences = self._sequences[step.cache]
        embeds = [row for agent in step.agents for row in self._turns[agent].embeds]
        prefixes, hidden = sequences.prefixes, sequences.hidden
        sequences.begin([None] * len(embeds), sequences)
        sequences.prefixes = prefixes
        sequences.prefill(embeds, [0] * len(embeds))
        sequences.hidden = hidden

    def _runs(self, row: int, round_: int) -> bool:
        """Tell whether a record takes part in a round; some run for its neighbours only."""
        return not self.converged[row] or round_ == self.plan.rounds

    def _find_converged(self, round_: int) -> None:
        """Find the records whose messages no longer change; what they are sent stays as it is."""
        if self.plan.stop_when is None or round_ == self.plan.rounds:
            return
        for link in [link for link, sent_in in self.messages if sent_in == round_]:
            sent: Any = self.messages[link, round_]
            for row in np.flatnonzero(self.converged).tolist():
                final = self.messages.get((link, int(self.converged[row])))
                if final is not None:
                    sent[row] = final[row]
        if round_ not in self._compared:
            return
        lowest = np.min(
            [
                mean_cosine(
                    np.asarray(self.messages[link, round_]),
                    np.asarray(self.messages[link, round_ - 1]),
                )
                for link in self._compared[round_]
            ],
            axis=0,
        )
        has_converged = lowest >= self.plan.stop_when.cosine
        self.converged[(self.converged == 0) & has_converged] = round_

    def _lookups(self, agents: Sequence[str]) -> list[PromptLookup] | None:
        """Return what drafts the texts behind the prompts of agents, where the plan has drafts."""
        plan = self.plan.speculation
        prompts = (prompt for agent in agents for prompt in self._turns[agent].prompts)
        return None if plan is None else [PromptLookup(plan, prompt) for prompt in prompts]

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
            if not isinstance(step, CacheStep) or step.cache != cache_id:
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
