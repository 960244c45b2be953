"""What agents hand to each other while a plan runs: made of a turn, put before or into a prompt.

Shape legend: B records, T positions of a prompt, M latent steps, n vectors of one message, d width,
H heads, P rows, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np

from recmas_runtime.engines.interface import Backbone, Floats
from recmas_runtime.formats.messages import MessageForm, RowsOf, message_spans
from recmas_runtime.formats.plan import Plan, SendStep
from recmas_runtime.prompts.render import Prompt, Tokens
from recmas_runtime.scheduling.remote_calls import RemoteUse
from recmas_runtime.sequences.sequence_batch import Rows, SequenceBatch

# Of each record, in order: thoughts [B, M, d]; or a list of vectors [n, d], of texts, or of the
# pieces of rows that one message is made of.
Messages = Floats | list[Floats] | list[str] | list[tuple[Rows, ...]]


class StepCounts(TypedDict, total=False):
    """What a step dealt with, per record; the counts and texts of `run_trace.StepEvent`."""

    prefilled_tokens: tuple[int, ...]
    reused_tokens: tuple[int, ...]
    written_tokens: tuple[int, ...]
    cut_texts: tuple[int, ...]
    handed_rows: tuple[int, ...]
    handed_bytes: tuple[int, ...]
    drafted_tokens: tuple[int, ...]
    accepted_tokens: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]
    remote: tuple[tuple[RemoteUse, ...], ...]


@dataclass(kw_only=True)
class Received:
    """What one prompt of one record receives, by slot.

    Attributes:
        rows: They come before the prompt, in the order of its slots.
    """

    vectors: dict[str, Floats] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    rows: list[Rows] = field(default_factory=list)

    def add(self, slot: str, sent: Floats | str | tuple[Rows, ...]) -> None:
        """Take a message for a slot."""
        if isinstance(sent, str):
            self.texts[slot] = sent
        elif isinstance(sent, tuple):
            self.rows += sent
        else:
            self.vectors[slot] = sent

    @property
    def slots(self) -> dict[str, int]:
        """How many positions vectors take in each slot."""
        return {slot: len(vectors) for slot, vectors in self.vectors.items()}


@dataclass(kw_only=True)
class Turn:
    """What an agent's turn in a round has left, of which its messages are made.

    Attributes:
        first_row: The row of the first record within the sequences.
        prompts: Of each record, and by slot how many positions vectors took in it.
        embeds: Input embeddings [T, d] of the prompts, where layers keep states.
        written: The states [n, d] at the tokens that it has written, if they are kept.
    """

    sequences: SequenceBatch
    first_row: int
    prompts: Sequence[Prompt]
    slots: Sequence[Mapping[str, int]]
    embeds: Sequence[Floats]
    written: list[Floats] = field(default_factory=list)
    _rows: dict[RowsOf, list[Rows]] = field(default_factory=dict)

    def keep_rows(self, kind: RowsOf, counts: Sequence[int]) -> None:
        """Copy rows that lie behind the prompts now, and that what comes next may overwrite."""
        ends = self.sequences.lengths.tolist()
        self._rows[kind] = [
            self.sequences.read_rows(row, ends[row], ends[row] + count)
            for row, count in zip(self._own_rows, counts, strict=True)
        ]

    @property
    def _own_rows(self) -> range:
        return range(self.first_row, self.first_row + len(self.prompts))

    def rows_sent(self, form: MessageForm) -> list[tuple[Rows, ...]]:
        """Return the rows of a message, by record."""
        kinds: dict[RowsOf, list[Rows]] = dict(self._rows)
        if form.needs_context:
            kind = form.rows[0]
            kinds[kind] = [
                self.sequences.read_rows(row, first, first + prompt.num_rows(kind, slots))
                for row, first, prompt, slots in self._placed()
            ]
        return [
            tuple(replace(kinds[kind][b], seen_by=form.layers) for kind in form.rows)
            for b in range(len(self.prompts))
        ]

    def states_sent(self, form: MessageForm, latent_steps: int) -> list[Floats]:
        """Return the states [n, d] that become a message's vectors, by record."""
        if form.carries == "written":
            return self.written
        found: list[Floats] = []
        for row, first, prompt, slots in self._placed():
            places = prompt.context_positions(form.of, slots)
            states = self.sequences.hidden[row][[first + place for place in places]]
            found.append(pooled(states, message_spans(form, len(places), latent_steps)))
        return found

    def _placed(self) -> list[tuple[int, int, Prompt, Mapping[str, int]]]:
        """Return for each record its row, where its prompt begins there, and the prompt."""
        rows = self._own_rows
        starts = self.sequences.num_foreign[rows.start : rows.stop]
        return list(zip(rows, starts, self.prompts, self.slots, strict=True))


def pooled(states_TD: Floats, spans: Sequence[tuple[int, int]]) -> Floats:
    """Return the mean of states over each span of positions, [n, d]."""
    means = [states_TD[first:last].mean(axis=0, dtype=np.float32) for first, last in spans]
    return np.stack(means) if means else states_TD[:0]


def splice(engine: Backbone[Any], prompt: Prompt, thoughts: Mapping[str, Floats]) -> Floats:
    """Return one prompt's input embeddings [T, d], messages in their slots."""
    pieces: list[Floats] = []
    for item in prompt.items:
        if isinstance(item, Tokens):
            pieces.append(engine.embed(np.array([item.ids], np.int64))[0])
        elif item.agent in thoughts:  # else the slot stays empty
            pieces.append(thoughts[item.agent])
    return np.concatenate(pieces)


def handed_counts(rows: Sequence[Sequence[Rows]], num_links: int) -> StepCounts:
    """Count rows that are handed over, by record, and their bytes, for all links together."""
    return {
        "handed_rows": tuple(num_links * sum(piece.count for piece in own) for own in rows),
        "handed_bytes": tuple(num_links * sum(piece.num_bytes for piece in own) for own in rows),
    }


def compared_links(plan: Plan) -> dict[int, frozenset[str]]:
    """Return, by round, the links that decide whether a record has converged in it.

    These are the links that sent thoughts in the round and in the one before: of these alone are
    there equally many in every round. Rounds that the last one cannot follow, because it would lack
    a message of whatever kind, do not appear.
    """
    required = {message.link for message in plan.answer_step.exits}
    thoughts = {name for name, link in plan.links.items() if link.carries == "thoughts"}
    sent: dict[int, set[str]] = {round_: set() for round_ in range(1, plan.rounds + 1)}
    for step in plan.steps:
        if isinstance(step, SendStep):
            sent[step.round].update(step.links)
    found = {
        round_: frozenset(sent[round_] & sent[round_ - 1] & thoughts)
        for round_ in range(2, plan.rounds)
        if required & thoughts and required <= sent[round_]
    }
    return {round_: links for round_, links in found.items() if links}


def mean_cosine(left_BMD: Floats, right_BMD: Floats) -> Floats:
    """Return for each record the mean over positions of the cosine between two messages [B]."""
    products = np.sum(left_BMD * right_BMD, axis=-1)
    norms = np.linalg.norm(left_BMD, axis=-1) * np.linalg.norm(right_BMD, axis=-1)
    cosines = products / np.maximum(norms, np.finfo(np.float32).tiny)
    return np.asarray(cosines.mean(axis=-1), np.float32)


def sends_states(plan: Plan, agent: str) -> bool:
    """Tell whether states at the positions of an agent's prompt are sent."""
    links = (link for link in plan.links.values() if link.source == agent)
    return any(link.carries == "context" for link in links)


def sends_rows(plan: Plan, agent: str, kind: RowsOf) -> bool:
    """Tell whether rows of this kind are handed over by an agent."""
    return any(kind in link.rows for link in plan.links.values() if link.source == agent)
