"""Text generation from prefilled sequences, token by token: the one way that text is written.

The answer of a latent system is written here, and so is the text that agents of a text system pass
to each other. Rows whose text is finished leave the batch. Where an answer calls a tool, its result
joins the text and the cache, and decoding goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recmas_runtime.core.errors import fail
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.prompts.sampler import Sampler, StopMatcher
from recmas_runtime.prompts.tokenizer import IncrementalDecoder, Tokenizer
from recmas_runtime.running.records import FinishReason
from recmas_runtime.running.sequence_batch import SequenceBatch
from recmas_runtime.tools.calls import CallScanner, ToolResult, result_block
from recmas_runtime.tools.toolbox import Toolbox


@dataclass(frozen=True, kw_only=True)
class DecoderSettings:
    """What turns a backbone's tokens into text, up to as many positions as it was made for.

    Its table of embeddings has `num_rows`.
    """

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    max_positions: int
    num_rows: int


class RowDecoder:
    """One text in the making: tokens to text, stop strings, tool calls, the reason it ended.

    Attributes:
        text: What is certain so far, results of tools included.
        num_tokens: Tokens that the model wrote, one that ended the text included.
        finish_reason: None while it goes on.
    """

    def __init__(
        self, settings: DecoderSettings, stop: Sequence[str], scanner: CallScanner | None = None
    ) -> None:
        self._eos = settings.eos_token_ids
        self._tokenizer = settings.tokenizer
        self._num_rows = settings.num_rows
        self._decoder = IncrementalDecoder(settings.tokenizer)
        self._stop = stop
        self._matcher = StopMatcher(stop)
        self._scanner = scanner
        self.text = ""
        self.num_tokens = 0
        self.num_result_tokens = 0
        self.results: list[ToolResult] = []
        self.finish_reason: FinishReason | None = None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain."""
        self.num_tokens += 1
        if token_id in self._eos:
            return self.finish("stop")
        piece = self._matcher.push(self._decoder.push(token_id))
        self.text += piece
        if self._matcher.stopped:
            self.finish_reason = "stop"
        return piece

    def finish(self, reason: FinishReason) -> str:
        """End the text; returns what was held back."""
        piece = self._matcher.push(self._decoder.flush()) + self._matcher.flush()
        self.text += piece
        # Held-back bytes may complete a stop string after all.
        self.finish_reason = "stop" if self._matcher.stopped else reason
        return piece

    def call_tool(self, piece: str, toolbox: Toolbox) -> tuple[str, tuple[int, ...]]:
        """Run the call that `piece` completes, if it does; returns its result, text and tokens."""
        assert self._scanner is not None, "this text calls no tools"
        call = self._scanner.push(piece)
        if call is None:
            return "", ()
        result = toolbox.run(call, num_earlier=len(self.results))
        self.results.append(result)
        block = result_block(result)
        # A stop string ends what the model writes, never what a tool says.
        held = self._matcher.flush()
        self._matcher = StopMatcher(self._stop)
        self.text += held + block
        # Text of a tool must never become control tokens.
        ids = self._tokenizer.encode_piece(block, self._tokenizer.control_spans(block))
        beyond = next((token_id for token_id in ids if token_id >= self._num_rows), None)
        if beyond is not None:
            raise fail(
                "RM500",
                f"the result of the tool `{call.name}` has the token "
                f"{self._tokenizer.token_text(beyond)!r} ({beyond}), which the backbone has no "
                "embedding for",
                hint="Build with the tokenizer of this very model.",
            )
        self.num_result_tokens += len(ids)
        return held + block, ids


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
        toolbox: Toolbox | None = None,
        keeps_sequences: bool,
    ) -> None:
        self._sequences = sequences
        self._keeps_sequences = keeps_sequences
        self._settings = settings
        self._max_new_tokens = sampling.max_new_tokens
        self._sampler = Sampler(sampling, seeds)
        self._toolbox = toolbox
        scanners = [None if toolbox is None else toolbox.scanner() for _ in seeds]
        self.writers = [RowDecoder(settings, sampling.stop, scanner) for scanner in scanners]
        # When the first tokens were there, by `time.perf_counter`.
        self.first_at: float | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Write until every text is finished; yields (row, text) as text becomes certain."""
        sequences, keep = self._sequences, self._keeps_sequences
        rows = list(range(len(self.writers)))
        while True:
            chosen = self._sampler.choose(sequences.logits(), rows).tolist()
            if self.first_at is None:
                self.first_at = time.perf_counter()
            going: list[int] = []  # places in the batch
            tokens: list[tuple[int, ...]] = []
            for place, (row, token_id) in enumerate(zip(rows, chosen, strict=True)):
                writer = self.writers[row]
                piece, result_ids = self._write(writer, token_id, int(sequences.lengths[place]))
                if piece:
                    yield row, piece
                if writer.finish_reason is None:
                    going.append(place)
                    tokens.append((token_id, *result_ids))
            if not going:
                return
            if len(going) < len(rows):
                sequences = sequences.select(going, keep=keep)
                rows = [rows[place] for place in going]
                keep = False
            sequences.feed(tokens)

    def _write(self, writer: RowDecoder, token_id: int, length: int) -> tuple[str, tuple[int, ...]]:
        """Add a token to a text of `length` positions; returns new text and a result's tokens."""
        piece = writer.push(token_id)
        ids: tuple[int, ...] = ()
        if writer.finish_reason is None and writer.num_tokens == self._max_new_tokens:
            piece += writer.finish("length")
        if writer.finish_reason is None and self._toolbox is not None:
            result, ids = writer.call_tool(piece, self._toolbox)
            piece += result
        is_full = length + 1 + len(ids) > self._settings.max_positions
        if writer.finish_reason is None and is_full:
            piece += writer.finish("length")
        return piece, ids
