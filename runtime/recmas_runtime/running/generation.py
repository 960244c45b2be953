"""Text generation from prefilled sequences, token by token: the one way that text is written.

The answer of a latent system is written here, and so is the text that agents of a text system pass
to each other. Rows whose text is finished leave the batch. Where an answer calls a tool, its result
joins the text and the cache, and decoding goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.text import THINKING_MARKS
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.formats.precisions import PRECISIONS
from recmas_runtime.prompts.sampler import Sampler, StopMatcher, is_greedy
from recmas_runtime.prompts.tokenizer import IncrementalDecoder, Tokenizer
from recmas_runtime.prompts.tool_turns import PLAIN_RESULTS, ResultForm
from recmas_runtime.running.records import FinishReason
from recmas_runtime.running.run_trace import StepEvent
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.scheduling.remote_calls import RemoteAnswers, RemoteUse, RemoteWriter
from recmas_runtime.sequences.drafts import DraftedRow, PromptLookup
from recmas_runtime.sequences.messages import StepCounts
from recmas_runtime.sequences.sequence_batch import SequenceBatch
from recmas_runtime.tools.call_forms import is_in_marks
from recmas_runtime.tools.calls import ToolCall, ToolResult, result_block

if TYPE_CHECKING:
    from recmas_runtime.tools.toolbox import Toolbox

# Special tokens that an answer shows: whoever reads it must find the end of the thinking.
_SHOWN: Final = frozenset(mark for marks in THINKING_MARKS for mark in marks)


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What turns a backbone's tokens into text, up to as many positions as it was made for.

    Its table of embeddings has `num_rows`.
    """

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_positions: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class AnswerTools:
    """The tools of an answer, how their results are written, and what they let others compute on.

    Attributes:
        lock: Is held while text is written, and given up while a tool runs.
    """

    toolbox: Toolbox
    lock: EngineLock
    results: ResultForm = PLAIN_RESULTS

    def run(self, call: ToolCall, *, num_earlier: int) -> ToolResult:
        """Run one call while others compute."""
        return self.lock.run_outside(lambda: self.toolbox.run(call, num_earlier=num_earlier))


class RowDecoder:
    """One text in the making: tokens to text, stop strings, tool calls, the reason it ended.

    Special tokens that a stop string names, or that mark calls or thinking, are text to whoever
    looks for those; all others are left out at once.

    Attributes:
        text: What is certain so far, calls and results of tools included.
        num_tokens: Tokens that the model wrote, one that ended the text included.
        finish_reason: None while it goes on.
        calls: Those that the last token completed. They are yet to be run, unless it ended the
            text.
    """

    def __init__(
        self,
        settings: DecoderSettings,
        stop: Sequence[str],
        tools: AnswerTools | None = None,
        *,
        specials: Mapping[int, str],
    ) -> None:
        self._eos = settings.eos_token_ids
        self._tokenizer = settings.tokenizer
        self._num_rows = settings.num_rows
        self._decoder = IncrementalDecoder(settings.tokenizer)
        self._stop = stop
        self._matcher = StopMatcher(stop)
        self._tools = tools
        self._scanner = None if tools is None else tools.toolbox.scanner()
        self._specials = specials
        # Characters of the model's text so far, of them passed on, and where special tokens are.
        self._num_decoded = 0
        self._num_passed = 0
        self._special_spans: list[tuple[int, int]] = []
        self._leaves_out_token = False
        self.text = ""
        self.num_tokens = 0
        self.num_result_tokens = 0
        self.calls: tuple[ToolCall, ...] = ()
        self.results: list[ToolResult] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain."""
        self.num_tokens += 1
        if token_id in self._eos:
            return self._end_turn(token_id)
        piece = self._take(self._matcher.push(self._decoded(token_id)))
        if self._matcher.stopped:
            piece += self._finished("stop")
        return piece

    def finish(self, reason: FinishReason) -> str:
        """End the text; returns what was held back."""
        tail = self._counted(self._decoder.flush())
        piece = self._take(self._matcher.push(tail) + self._matcher.flush())
        # Held-back bytes may complete a stop string after all.
        return piece + self._finished("stop" if self._matcher.stopped else reason)

    def run_calls(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """Run the calls that the last token completed.

        Returns the text of their results, and the tokens that the model reads next: the last
        token, unless the results' form ends the turn in its place, and those of the results.
        """
        assert self._tools is not None, "this text calls no tools"
        # What is held back stands before the results. A stop string ends what the model writes,
        # never what a tool says.
        held = self._matcher.flush()
        self._matcher = StopMatcher(self._stop)
        piece = self._shown(held)
        if self._scanner is not None:
            self._scanner.skip(held)
        first = len(self.results)
        for call in self.calls:
            result = self._readable(self._tools.run(call, num_earlier=len(self.results)))
            self.results.append(result)
            piece += result_block(result.text)
        self.calls = ()
        self.text += piece
        ids = self._result_ids(self.results[first:])
        self.num_result_tokens += len(ids)
        return piece, ids if self._leaves_out_token else (token_id, *ids)

    def _readable(self, result: ToolResult) -> ToolResult:
        """Return a result, or an error in its place if the model has no tokens for its text."""
        try:
            is_readable = max(self._result_ids([result]), default=0) < self._num_rows
        except RecmasError:  # a control token that no other tokens spell
            is_readable = False
        if is_readable:
            return result
        text = "the result has characters that this model cannot read"
        return replace(result, status="error", text=text)

    def _result_ids(self, results: Sequence[ToolResult]) -> tuple[int, ...]:
        """Return the tokens of results; their text never becomes control tokens."""
        assert self._tools is not None, "this text calls no tools"
        texts = [result.text for result in results]
        written, spans = self._tools.results.write(texts, results[0].call.name)
        plain = [
            (first, last)
            for first, last in self._tokenizer.control_spans(written)
            if any(first < end and start < last for start, end in spans)
        ]
        return self._tokenizer.encode_piece(written, plain, continues=True)

    def _end_turn(self, token_id: int) -> str:
        """Take a token that ends the model's turn: the text, unless it completes a call."""
        tail = self._counted(self._decoder.flush())
        mark = self._special(token_id)
        text = self._matcher.push(tail + mark)
        if self._matcher.stopped or self._scanner is None:
            return self._take(text + self._matcher.flush()) + self._finished("stop")
        piece = self._take(text + self._matcher.flush(), end_mark=mark)
        if not self.calls:
            piece += self._finished("stop")
        return piece

    def _finished(self, reason: FinishReason) -> str:
        """Note why the text ended; returns what was held back as a possible call."""
        self.finish_reason = reason
        piece = "" if self._scanner is None else self._shown(self._scanner.flush())
        self.text += piece
        return piece

    def _decoded(self, token_id: int) -> str:
        """Return the text that a token makes certain, special tokens included."""
        if token_id not in self._tokenizer.special_texts:
            return self._counted(self._decoder.push(token_id))
        mark = self._specials.get(token_id, "")
        tail = self._decoder.flush() if mark and self._decoder.holds_part else ""
        return self._counted(tail) + self._special(token_id)

    def _special(self, token_id: int) -> str:
        mark = self._specials.get(token_id, "")
        self._special_spans.append((self._num_decoded, self._num_decoded + len(mark)))
        return self._counted(mark)

    def _counted(self, text: str) -> str:
        self._num_decoded += len(text)
        return text

    def _take(self, text: str, *, end_mark: str | None = None) -> str:
        """Pass on text that belongs to no stop string; returns what is certain to be shown.

        Where it ends the model's turn, `end_mark` is what the last token shows of itself.
        """
        if self._scanner is None:
            piece = self._shown(text)
        else:
            passed = self._scanner.push(text, ended=end_mark is not None)
            piece = self._shown(passed.text)
            piece += self._shown(passed.call_text, whole=True) + self._shown(passed.behind)
            self.calls = passed.calls
            # A token that ends the turn is read only where it is the call's own closing mark.
            closes_call = bool(end_mark) and passed.call_text.endswith(end_mark or "")
            self._leaves_out_token = end_mark is not None and not closes_call
        self.text += piece
        return piece

    def _shown(self, text: str, *, whole: bool = False) -> str:
        """Return the next characters of the model's text as the answer shows them.

        Calls are shown whole, of special tokens else only the marks of thinking.
        """
        start = self._num_passed
        self._num_passed = end = start + len(text)
        if whole:
            return text
        shown, place = "", start
        for first, last in self._special_spans:
            if first >= end or last <= start:
                continue
            mark = text[max(first, start) - start : last - start]
            shown += text[place - start : max(first, start) - start]
            shown += mark if mark in _SHOWN else ""
            place = min(last, end)
        self._special_spans = [span for span in self._special_spans if span[1] > end]
        return shown + text[place - start :]


class TextGenerator:
    """Decodes the text of every prefilled sequence of a batch; the writers are one for each row.

    Sequences that are kept are used again, so what is in their cache stays.
    """

    def __init__(
        self,
        sequences: SequenceBatch,
        *,
        settings: DecoderSettings,
        sampling: SamplingPlan,
        seeds: Sequence[int],
        tools: AnswerTools | None = None,
        keeps_sequences: bool,
        lookups: Sequence[PromptLookup] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._sequences = sequences
        self._keeps_sequences = keeps_sequences
        self._settings = settings
        self._max_new_tokens = sampling.max_new_tokens
        self._sampler = Sampler(sampling, seeds)
        stop = sampling.stop
        specials = visible_specials(settings.tokenizer, stop, tools)
        self.writers = [RowDecoder(settings, stop, tools, specials=specials) for _ in seeds]
        # Of each row, the tokens of its text, without the one that ended it.
        self.written: list[list[int]] = [[] for _ in seeds]
        # By row, where text is greedy. Only one row drafts: several share each step, which gains
        # more.
        self._lookups = lookups if is_greedy(sampling) else None
        self.drafted: dict[int, DraftedRow] = {}
        self._clock = clock
        self.uses: Sequence[RemoteUse] = ()  # no remote model has a part in it
        # When the first tokens were there, by the clock.
        self.first_at: float | None = None

    @property
    def has_drafts(self) -> bool:
        """Whether text may be drafted."""
        return self._lookups is not None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Write until every text is finished; yields (row, text) as text becomes certain."""
        sequences, keep = self._sequences, self._keeps_sequences
        rows = list(range(len(self.writers)))
        while True:
            drafted = self._drafted(sequences, rows)
            logits = sequences.logits() if drafted is None else drafted.logits()
            chosen = self._sampler.choose(logits, rows).tolist()
            if self.first_at is None:
                self.first_at = self._clock()
            going: list[int] = []  # places in the batch
            tokens: list[tuple[int, ...]] = []
            for place, (row, token_id) in enumerate(zip(rows, chosen, strict=True)):
                writer = self.writers[row]
                piece, ids = self._write(writer, token_id, int(sequences.lengths[place]))
                if piece:
                    yield row, piece
                if writer.finish_reason is None:
                    going.append(place)
                    tokens.append(ids)
                if writer.finish_reason != "stop":
                    self.written[row] += ids
            if not going:
                return
            if len(going) < len(rows):
                sequences = sequences.select(going, keep=keep)
                rows = [rows[place] for place in going]
                keep = False
            if drafted is None:
                sequences.feed(tokens)
            else:
                drafted.feed(tokens[0], room=self._room(rows[0], drafted.length))

    def _drafted(self, sequences: SequenceBatch, rows: Sequence[int]) -> DraftedRow | None:
        """Return the one row that is left, where its text may be drafted."""
        if self._lookups is None or len(rows) > 1 or sequences.keeps_states:
            return None
        margin = PRECISIONS[sequences.engine.entry.precision].draft_margin
        if margin is None:
            return None
        (row,) = rows
        if row not in self.drafted:
            lookup = self._lookups[row]
            lookup.push(self.written[row])
            self.drafted[row] = DraftedRow(sequences, lookup, margin)
        return self.drafted[row]

    def _room(self, row: int, length: int) -> int:
        """Return how many tokens may be drafted behind the next position, and one follow them."""
        left = self._max_new_tokens - self.writers[row].num_tokens
        return min(left, self._settings.max_positions - length) - 1

    def _write(self, writer: RowDecoder, token_id: int, length: int) -> tuple[str, tuple[int, ...]]:
        """Add a token to a text of `length` positions; returns new text and what is read next."""
        piece = writer.push(token_id)
        ids: tuple[int, ...] = (token_id,)
        if writer.finish_reason is None and writer.num_tokens == self._max_new_tokens:
            piece += writer.finish("length")
        if writer.finish_reason is None and writer.calls:
            result, ids = writer.run_calls(token_id)
            piece += result
        is_full = length + len(ids) > self._settings.max_positions
        if writer.finish_reason is None and is_full:
            piece += writer.finish("length")
        return piece, ids


def visible_specials(
    tokenizer: Tokenizer, stop: Sequence[str], tools: AnswerTools | None = None
) -> dict[int, str]:
    """Return the special tokens that somebody looks for: as stop strings, calls or thinking."""
    return {
        token_id: text
        for token_id, text in tokenizer.special_texts.items()
        if text in _SHOWN
        or any(text in string or string in text for string in stop)
        or (tools is not None and is_in_marks(text, tools.toolbox.names))
    }


def draft_counts(generator: TextGenerator | RemoteAnswers, num_records: int) -> StepCounts:
    """Return by record the tokens that were drafted, and those accepted; nothing without drafts.

    Rows are those of the records for the first agent, then for the next one.
    """
    if not isinstance(generator, TextGenerator) or not generator.has_drafts:
        return {}
    rows = [[0, 0] for _ in generator.writers]
    for place, row in generator.drafted.items():
        rows[place] = [row.num_drafted, row.num_accepted]
    drafted, accepted = (
        tuple(sum(row[which] for row in rows[b::num_records]) for b in range(num_records))
        for which in (0, 1)
    )
    return {"drafted_tokens": drafted, "accepted_tokens": accepted}


def tool_events(
    generator: TextGenerator | RemoteAnswers, round_: int, agents: tuple[str, ...]
) -> list[StepEvent]:
    """Return what the tools took that a text called; nothing if it called none."""
    # Only the answer agent has tools, so rows are records.
    writers: Sequence[RowDecoder | RemoteWriter] = generator.writers
    calls = [(row, r) for row, writer in enumerate(writers) for r in writer.results]
    if not calls:
        return []
    ms = sum(result.ms for _, result in calls)
    return [StepEvent(op="tools", round=round_, agents=agents, ms=ms, tool_calls=tuple(calls))]
