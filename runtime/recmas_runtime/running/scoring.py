"""How likely texts are: as answers behind the answer agent's prefilled prompt, or on their own.

A candidate is read as if the answer agent had written it, up to its last token: what would end the
answer does not count. The prompt and everything before it run once for a record.

A text on its own is read by a backbone alone, without a template and without other agents.

Shape legend: R rows (records), S positions of a call, N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, RecordError, fail
from recmas_runtime.core.text import counted
from recmas_runtime.engines.interface import Backbone, Floats, Operands
from recmas_runtime.formats.manifest import BackboneEntry, Manifest
from recmas_runtime.formats.plan import AgentPlan, Plan, cache_capacity
from recmas_runtime.prompts.render import Tokens
from recmas_runtime.prompts.tokenizer import IncrementalDecoder, Tokenizer
from recmas_runtime.running.executor import Engines
from recmas_runtime.running.record_prompts import RecordPrompts
from recmas_runtime.running.records import Record, RecordId, Timing, Usage
from recmas_runtime.sequences.sequence_batch import SequenceBatch

# Logits of so many tokens are in memory at once.
_MOST_TOKENS: Final = 256
# Positions of a text on its own that run in one engine call, and logits in memory meanwhile.
_CHUNK: Final = 128
_MOST_LOGITS: Final = 2**21


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The candidates of one record, and how likely each is.

    Attributes:
        id: The record's.
        losses: By candidate the sum over its tokens of their negative log likelihood, in nats.
        num_tokens: By candidate.
        greedy: By candidate, whether each of its tokens is the likeliest in its place.
        rounds: As in `Answer`, like what follows; nothing was written for the answer itself.
    """

    id: RecordId
    record: Mapping[str, object]
    candidates: tuple[str, ...]
    losses: tuple[float, ...]
    num_tokens: tuple[int, ...]
    greedy: tuple[bool, ...]
    rounds: int
    usage: Usage
    timing_ms: Timing
    batch_size: int = 1

    @property
    def mean_losses(self) -> tuple[float, ...]:
        """By candidate the loss per token, in nats: what candidates are ranked by."""
        return tuple(loss / count for loss, count in zip(self.losses, self.num_tokens, strict=True))

    def rank(self, candidate: int) -> int:
        """Return a candidate's place among all, 1 for the likeliest; others as likely come first.

        The measure is the loss per token.
        """
        means = self.mean_losses
        others = (mean for place, mean in enumerate(means) if place != candidate)
        return 1 + sum(mean <= means[candidate] for mean in others)

    def to_json(self) -> dict[str, Any]:
        """Return the form that files of answers have."""
        return {
            "id": self.id,
            "record": dict(self.record),
            "candidates": list(self.candidates),
            "losses": [round(loss, 6) for loss in self.losses],
            "num_tokens": list(self.num_tokens),
            "rounds": self.rounds,
            "usage": self.usage.to_json(),
            "timing_ms": self.timing_ms.to_json(),
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class CandidateReader:
    """Finds the tokens of records' candidates behind the answer agent's prompts.

    Attributes:
        tokenizer: What that agent's prompts are made with.
        verbatim: Take candidates character by character; see `read_candidates`.
    """

    plan: Plan
    manifest: Manifest
    tokenizer: Tokenizer
    verbatim: bool

    def __call__(
        self, texts: Sequence[str], prompts: RecordPrompts, record: Record
    ) -> dict[str, tuple[int, ...]]:
        """Return a record's candidates with their tokens; RM500 for those of no use."""
        agent = self.plan.answer_agent
        last = prompts.get(agent, self.plan.answer_prompt.variants[0], {}).items[-1]
        return read_candidates(
            texts,
            last.ids if isinstance(last, Tokens) else (),
            self.tokenizer,
            record=record,
            num_rows=self.manifest.num_rows[self.plan.agents[agent].backbone],
            verbatim=self.verbatim,
        )


def read_candidates(
    texts: Sequence[str],
    prompt_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    record: Record,
    num_rows: int,
    verbatim: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return a record's candidates with their tokens behind the last tokens of a prompt.

    Their text never becomes control tokens. A space is put before it where the prompt ends in the
    middle of a line of text, as that of templates does which mark turns with words.

    Args:
        num_rows: Of the backbone's table of embeddings.
        verbatim: Leave the white space around candidates as it is, and put none before them.

    Raises:
        RecmasError: RM500 for no candidates, for one that is there twice or empty, or that the
            model has no tokens for.
    """
    ends_turn = not prompt_ids or prompt_ids[-1] in tokenizer.special_texts
    before = "" if ends_turn else tokenizer.decode(list(prompt_ids[-8:]))
    space = " " if before and not before[-1].isspace() else ""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        written = text if verbatim else space + text.strip()
        ids = tokenizer.encode_piece(written, [(0, len(written))], continues=True)
        if not (text if verbatim else text.strip()):
            why = "is empty"
        elif text in found:
            why = "is there twice"
        elif not ids or max(ids) >= num_rows:
            why = "has characters that the backbone has no embeddings for"
        else:
            found[text] = ids
            continue
        raise _unusable(record, f"the candidate {text!r} {why}")
    if not found:
        raise _unusable(record, "there are no candidates")
    return found


def _unusable(record: Record, why: str) -> RecmasError:
    return fail("RM500", f"record {record.id!r}: {why}", hint="Correct the record's candidates.")


def check_room(
    sequences: SequenceBatch, row: int, candidates: Sequence[Sequence[int]], record: Record
) -> None:
    """Raise RM501, as the error of its record, for a candidate beyond the backbone's positions."""
    most = sequences.engine.entry.max_positions
    there, longest = int(sequences.lengths[row]), max(map(len, candidates), default=0)
    if there + longest > most:
        error = fail(
            "RM501",
            f"record {record.id!r}: a candidate of {longest} tokens stands behind {there} "
            f"positions, the backbone has {most}",
            hint="Shorten the record or its candidates.",
        )
        raise RecordError(row, error)


class Likelihood(NamedTuple):
    """The loss of a text in nats, and whether each of its tokens is the likeliest in its place."""

    loss: float
    greedy: bool


def score_candidates(
    sequences: SequenceBatch, candidates: Sequence[Sequence[Sequence[int]]]
) -> list[list[Likelihood]]:
    """Return how likely every candidate of every row is; the sequences stay as they are.

    Args:
        sequences: R rows, each prefilled up to where an answer begins.
        candidates: By row, token ids; rows may have different numbers of them.
    """
    first_RV = _log_likelihoods(sequences.logits())
    found = [[Likelihood(0.0, True) for _ in row] for row in candidates]
    # The longest ones first: texts that are read beside each other are then about as long.
    orders = [
        sorted(range(len(row)), key=[-len(ids) for ids in row].__getitem__) for row in candidates
    ]
    for turn in range(max(map(len, candidates), default=0)):
        # Rows with fewer candidates read their shortest one again beside the others.
        places = [order[min(turn, len(order) - 1)] for order in orders]
        column = [row[place] for row, place in zip(candidates, places, strict=True)]
        later = _later_tokens(sequences, column)
        for row, (place, ids) in enumerate(zip(places, column, strict=True)):
            first = _told(first_RV[row], ids[0])
            loss, greedy = later[row]
            found[row][place] = Likelihood(first.loss + loss, first.greedy and greedy)
    return found


def _told(told_V: NDArray[np.float64], token_id: int) -> Likelihood:
    return Likelihood(float(-told_V[token_id]), int(told_V.argmax()) == token_id)


def _later_tokens(sequences: SequenceBatch, column: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Return how likely a text's tokens after the first one are, one text for each row."""
    found = [Likelihood(0.0, True) for _ in column]
    if max(map(len, column)) == 1:
        return found
    # The last token is not read, only told; a text of a single one keeps its row company.
    hidden_RSD = sequences.look_ahead([ids[:-1] or ids for ids in column])
    wanted = [(row, s) for row, ids in enumerate(column) for s in range(len(ids) - 1)]
    for begin in range(0, len(wanted), _MOST_TOKENS):
        some = wanted[begin : begin + _MOST_TOKENS]
        hidden_ND = np.ascontiguousarray(np.stack([hidden_RSD[row, s] for row, s in some]))
        told_NV = _log_likelihoods(sequences.engine.logits(hidden_ND))
        for n, (row, s) in enumerate(some):
            loss, greedy = _told(told_NV[n], column[row][s + 1])
            found[row] = Likelihood(found[row].loss + loss, found[row].greedy and greedy)
    return found


def _log_likelihoods(logits: Floats) -> NDArray[np.float64]:
    """Return the log likelihoods [N, V] of logits [N, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, kw_only=True)
class ReadToken:
    """A token of a text that was read on its own.

    Attributes:
        text: What it adds to the text; empty for one that stands for no text, and for all but the
            last of those that make one character.
        offset: Where that begins, in characters.
        logprob: Its log-probability behind all before it, in nats; None for the first token.
        top: The likeliest tokens in its place, the likeliest first, with their log-probabilities;
            none for the first token.
    """

    id: int
    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()


def read_text(
    engines: Engines,
    agent: AgentPlan,
    tokenizer: Tokenizer,
    text: str | Sequence[int],
    *,
    top: int = 0,
) -> list[ReadToken]:
    """Return how likely each token of a text on its own is to an agent's backbone.

    Args:
        text: As text, before which the tokenizer puts what it puts before every text, or as token
            ids, which are read as they are.
        top: How many likeliest tokens are given for each place.

    Raises:
        RecmasError: RM500 for no tokens, or one that the backbone has no embedding for, RM501 for
            more tokens than it has positions.
    """
    engine = engines.backbones[agent.backbone]
    placed = _placed(tokenizer, text, engine.entry)
    named = cache(tokenizer.text_of)
    found: list[ReadToken] = []
    told_V: NDArray[np.float64] | None = None  # of the token that comes next
    behind = _each_behind(engine, [i for i, *_ in placed], engines.stacked([agent.inner]))
    for (token_id, piece, offset), next_V in zip(placed, behind, strict=True):
        likeliest = [] if told_V is None else _top(told_V, top)
        found.append(
            ReadToken(
                id=token_id,
                text=piece,
                offset=offset,
                logprob=None if told_V is None else float(told_V[token_id]),
                top=tuple((named(i), logprob) for i, logprob in likeliest),
            )
        )
        told_V = next_V
    return found


def _each_behind(
    engine: Backbone[Any], ids: Sequence[int], inner: Operands
) -> Iterator[NDArray[np.float64]]:
    """Yield the log likelihoods [V] of what comes behind each token of a text.

    Args:
        inner: Of any inner link: it makes no difference here.
    """
    rows = engine.new_cache(1, cache_capacity(len(ids)))
    num_logits = max(1, _MOST_LOGITS // engine.entry.vocab_size)
    try:
        for start in range(0, len(ids), _CHUNK):
            chunk_1S = np.array([ids[start : start + _CHUNK]], np.int64)
            last = np.array([chunk_1S.shape[1] - 1], np.int64)
            hidden_1SD, *_ = engine.forward(
                rows, engine.embed(chunk_1S), np.array([start], np.int64), last, inner
            )
            for begin in range(0, chunk_1S.shape[1], num_logits):
                some_ND = np.ascontiguousarray(hidden_1SD[0, begin : begin + num_logits])
                yield from _log_likelihoods(engine.logits(some_ND))
    finally:
        engine.release(rows)


def _placed(
    tokenizer: Tokenizer, text: str | Sequence[int], entry: BackboneEntry
) -> list[tuple[int, str, int]]:
    """Return each token of a text with what it adds to it and where that begins."""
    if isinstance(text, str):
        _check_text(text, tokenizer, entry)
        found = tokenizer.encode_raw(text)
        _check_ids([token_id for token_id, _ in found], entry)
        ends = [*(start for _, start in found[1:]), len(text)]
        return [
            (token_id, text[start:end], start)
            for (token_id, start), end in zip(found, ends, strict=True)
        ]
    _check_ids(text, entry)
    decoder, at, placed = IncrementalDecoder(tokenizer), 0, []
    for place, token_id in enumerate(text):
        piece = decoder.push(token_id)
        piece += decoder.flush() if place == len(text) - 1 else ""
        placed.append((token_id, piece, at))
        at += len(piece)
    return placed


def _check_text(text: str, tokenizer: Tokenizer, entry: BackboneEntry) -> None:
    """Refuse what is no text, and what cannot fit before it is encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        hint = "Correct the text."
        raise fail("RM500", "the text holds half a surrogate pair", hint=hint) from None
    most = tokenizer.max_token_chars
    if most is not None and len(text) > most * entry.max_positions:
        raise _too_long(f"{len(text)} characters", entry)


def _check_ids(ids: Sequence[int], entry: BackboneEntry) -> None:
    if not ids:
        raise fail("RM500", "the text is empty", hint="Give a text of at least one token.")
    if len(ids) > entry.max_positions:
        raise _too_long(counted(len(ids), "token"), entry)
    beyond = next((token_id for token_id in ids if not 0 <= token_id < entry.vocab_size), None)
    if beyond is not None:
        raise fail(
            "RM500",
            f"there is no embedding for token {beyond}, the backbone has {entry.vocab_size}",
            hint="Give ids of its own tokenizer.",
        )


def _too_long(has: str, entry: BackboneEntry) -> RecmasError:
    return fail(
        "RM501",
        f"the text has {has}, the backbone has {entry.max_positions} positions",
        hint="Shorten the text.",
    )


def _top(told_V: NDArray[np.float64], count: int) -> list[tuple[int, float]]:
    """Return the likeliest tokens, the likeliest first and of equals the one of the lower id."""
    if count <= 0:
        return []
    found = np.argpartition(-told_V, min(count, len(told_V)) - 1)[:count]
    return sorted(zip(found.tolist(), told_V[found].tolist(), strict=True), key=_by_likelihood)


def _by_likelihood(pair: tuple[int, float]) -> tuple[float, int]:
    return -pair[1], pair[0]
