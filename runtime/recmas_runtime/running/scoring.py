"""How likely texts are as answers: candidates read behind the answer agent's prefilled prompt.

A candidate is read as if the answer agent had written it, up to its last token: what would end the
answer does not count. The prompt and everything before it run once for a record.

Shape legend: R rows (records), S positions of a call, N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.engines.interface import Floats
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.running.record_prompts import RecordError
from recmas_runtime.running.records import Record, RecordId, Timing, Usage
from recmas_runtime.sequences.sequence_batch import SequenceBatch

# Logits of so many tokens are in memory at once.
_MOST_TOKENS: Final = 256


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The candidates of one record, and how likely each is.

    Attributes:
        id: The record's.
        losses: By candidate the sum over its tokens of their negative log likelihood, in nats.
        num_tokens: By candidate.
        rounds: As in `Answer`, like what follows; nothing was written for the answer itself.
    """

    id: RecordId
    record: Mapping[str, object]
    candidates: tuple[str, ...]
    losses: tuple[float, ...]
    num_tokens: tuple[int, ...]
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
            "usage": asdict(self.usage),
            "timing_ms": {phase: round(ms, 3) for phase, ms in asdict(self.timing_ms).items()},
            "batch_size": self.batch_size,
        }


def read_candidates(
    texts: Sequence[str],
    prompt_ids: Sequence[int],
    tokenizer: Tokenizer,
    *,
    record: Record,
    num_rows: int,
) -> dict[str, tuple[int, ...]]:
    """Return a record's candidates with their tokens behind the last tokens of a prompt.

    Their text never becomes control tokens. A space is put before it where the prompt ends in the
    middle of a line of text, as that of templates does which mark turns with words.

    Args:
        num_rows: Of the backbone's table of embeddings.

    Raises:
        RecmasError: RM500 for no candidates, for one that is there twice or empty, or that the
            model has no tokens for.
    """
    ends_turn = not prompt_ids or prompt_ids[-1] in tokenizer.special_texts
    before = "" if ends_turn else tokenizer.decode(list(prompt_ids[-8:]))
    space = " " if before and not before[-1].isspace() else ""
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        written = space + text.strip()
        ids = tokenizer.encode_piece(written, [(0, len(written))], continues=True)
        if not text.strip():
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


def score_candidates(
    sequences: SequenceBatch, candidates: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Return the loss of every candidate of every row, in nats; the sequences stay as they are.

    Args:
        sequences: R rows, each prefilled up to where an answer begins.
        candidates: By row, token ids; rows may have different numbers of them.
    """
    first_RV = _log_likelihoods(sequences.logits())
    found = [[0.0 for _ in row] for row in candidates]
    # The longest ones first: texts that are read beside each other are then about as long.
    orders = [
        sorted(range(len(row)), key=[-len(ids) for ids in row].__getitem__) for row in candidates
    ]
    for turn in range(max(map(len, candidates), default=0)):
        # Rows with fewer candidates read their shortest one again beside the others.
        places = [order[min(turn, len(order) - 1)] for order in orders]
        column = [row[place] for row, place in zip(candidates, places, strict=True)]
        later = _later_losses(sequences, column)
        for row, (place, ids) in enumerate(zip(places, column, strict=True)):
            found[row][place] = float(-first_RV[row, ids[0]]) + later[row]
    return found


def _later_losses(sequences: SequenceBatch, column: Sequence[Sequence[int]]) -> list[float]:
    """Return the loss of a text's tokens after the first one, one text for each row."""
    losses = [0.0 for _ in column]
    if max(map(len, column)) == 1:
        return losses
    # The last token is not read, only told; a text of a single one keeps its row company.
    hidden_RSD = sequences.look_ahead([ids[:-1] or ids for ids in column])
    wanted = [(row, s) for row, ids in enumerate(column) for s in range(len(ids) - 1)]
    for begin in range(0, len(wanted), _MOST_TOKENS):
        some = wanted[begin : begin + _MOST_TOKENS]
        hidden_ND = np.ascontiguousarray(np.stack([hidden_RSD[row, s] for row, s in some]))
        told_NV = _log_likelihoods(sequences.engine.logits(hidden_ND))
        for n, (row, s) in enumerate(some):
            losses[row] -= float(told_NV[n, column[row][s + 1]])
    return losses


def _log_likelihoods(logits: Floats) -> NDArray[np.float64]:
    """Return the log likelihoods [N, V] of logits [N, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
