"""Thoughts in words: the tokens nearest to what agents think, feed back and send.

A thought is read through the backbone's head, as a token would be chosen after it. A vector that
stands in a prompt, fed back by an inner link or sent over an outer one, is held against the table
of input embeddings of the backbone that reads it. That table is run through the embedding engine
in pieces, once for all vectors of a batch, and never held as a whole.

Shape legend: N vectors, d width, n rows of the table or V of them all, K nearest tokens, m latent
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import fail
from recmas_runtime.engines.interface import Backbone, Floats, Indices
from recmas_runtime.formats.codec import Finite, Size, StrictStruct
from recmas_runtime.formats.ids import inner_link_id, link_ends
from recmas_runtime.formats.plan import Plan
from recmas_runtime.prompts.tokenizer import Tokenizer

# Numbers of a piece of the table, and scores that are there at a time: 8 and 32 MiB.
_TABLE_NUMBERS: Final = 2**21
_MOST_SCORES: Final = 2**23

# What is read: the record's place in the batch, then the agent that thought or the link that a
# vector went through, the round, and its vectors [m, d].
Vectors = Mapping[tuple[int, str, int], Floats]


class NearToken(StrictStruct, frozen=True, kw_only=True, omit_defaults=True):
    """A token near to a vector.

    Attributes:
        text: What it adds to a text. Parts of a character and special tokens are as the vocabulary
            spells them; rows that stand for no token have none.
        mass: Its part of the softmax over all tokens.
        cosine: Of the vector and the token's input embedding; None through the head.
    """

    id: Size
    text: str
    mass: Finite
    cosine: Finite | None = None


class Reading(StrictStruct, frozen=True, kw_only=True):
    """What a vector says: its norm, the nearest tokens in order, the mass of all others."""

    norm: Finite
    tokens: tuple[NearToken, ...]
    rest: Finite


class ThoughtReading(StrictStruct, frozen=True, kw_only=True):
    """One thought.

    Attributes:
        step: The latent step, from 1.
        cosine_before: To the same step's thought in the last round before this one that the agent
            took part in for this record; None in its first.
        head: The thought through its backbone's head.
        fed_back: The inner link's output for it, in the table of input embeddings.
    """

    agent: str
    round: Size
    step: Size
    cosine_before: Finite | None
    head: Reading
    fed_back: Reading


class MessageReading(StrictStruct, frozen=True, kw_only=True):
    """One vector of a message, in the table of the backbone that receives it; places from 1."""

    link: str
    round: Size
    place: Size
    embedding: Reading


class RecordReadings(StrictStruct, frozen=True, kw_only=True):
    """All that was thought and sent for one record, in order of rounds."""

    thoughts: tuple[ThoughtReading, ...]
    messages: tuple[MessageReading, ...]


@dataclass(frozen=True, kw_only=True)
class ThoughtReader:
    """Reads the vectors of a batch; `num_nearest` tokens for each, or as many as there are."""

    plan: Plan
    backbones: Mapping[str, Backbone[Any]]
    tokenizers: Mapping[str, Tokenizer]
    num_nearest: int
    _texts: dict[tuple[str, int], str] = field(default_factory=dict, repr=False)

    def read(self, thoughts: Vectors, inputs: Vectors, num_records: int) -> list[RecordReadings]:
        """Return what every record's vectors say.

        Args:
            thoughts: By record, agent and round.
            inputs: By record, link and round: what inner links fed back, what outer links sent.

        Raises:
            RecmasError: RM507 for vectors that are not finite.
        """
        backbone_of = {name: agent.backbone for name, agent in self.plan.agents.items()}
        heads = _read_each(thoughts, backbone_of.__getitem__, self._through_head)
        embeddings = _read_each(
            inputs, lambda link: backbone_of[link_ends(link)[1]], self._in_table
        )
        found_thoughts: list[list[ThoughtReading]] = [[] for _ in range(num_records)]
        found_messages: list[list[MessageReading]] = [[] for _ in range(num_records)]
        for key in sorted(heads, key=lambda key: key[2]):
            row, agent, round_ = key
            fed_back = embeddings.pop((row, inner_link_id(agent), round_))
            cosines = _cosines_before(thoughts, key)
            found_thoughts[row] += (
                ThoughtReading(
                    agent=agent, round=round_, step=step, cosine_before=c, head=h, fed_back=f
                )
                for step, (c, h, f) in enumerate(zip(cosines, heads[key], fed_back, strict=True), 1)
            )
        for row, link, round_ in sorted(embeddings, key=lambda key: key[2]):
            found_messages[row] += (
                MessageReading(link=link, round=round_, place=place, embedding=reading)
                for place, reading in enumerate(embeddings[row, link, round_], 1)
            )
        return [
            RecordReadings(thoughts=tuple(thought), messages=tuple(sent))
            for thought, sent in zip(found_thoughts, found_messages, strict=True)
        ]

    def _through_head(self, backbone: str, hidden: Floats) -> Iterator[Reading]:
        """Read final hidden states [N, d] as what the head says comes next."""
        engine = self.backbones[backbone]
        for block in _blocks(hidden, _MOST_SCORES // engine.entry.vocab_size):
            logits = engine.logits(block)
            _demand_finite(logits.max(axis=1))
            nearest = _Nearest(self.num_nearest, len(block))
            nearest.add(0, logits)
            yield from self._readings(backbone, np.linalg.norm(block, axis=1), nearest)

    def _in_table(self, backbone: str, vectors: Floats) -> Iterator[Reading]:
        """Read input vectors [N, d] by their cosines to the rows of the table [V, d].

        Directions that have nothing to do with each other have cosines of deviation 1 / sqrt(d), so
        the softmax is over cosines in units of that: a token's mass says how far it stands out.
        """
        engine = self.backbones[backbone]
        size, width = engine.entry.vocab_size, engine.entry.width
        num_rows = min(size, max(1, _TABLE_NUMBERS // width))
        unit = math.sqrt(width)
        for block in _blocks(vectors, _MOST_SCORES // num_rows):
            norms, directions = _directions(block)
            nearest = _Nearest(self.num_nearest, len(block))
            for first in range(0, size, num_rows):
                ids = np.arange(first, min(first + num_rows, size), dtype=np.int64)
                _, rows = _directions(engine.embed(ids[None])[0])
                nearest.add(first, unit * (directions @ rows.T))
            yield from self._readings(backbone, norms, nearest, unit=unit)

    def _readings(
        self, backbone: str, norms: Floats, nearest: _Nearest, *, unit: float | None = None
    ) -> Iterator[Reading]:
        """Return what was found near to vectors of these norms [N]; scores of cosines by a unit."""
        masses = np.exp(nearest.scores - nearest.log_totals[:, None])
        for norm, ids, scores, mass in zip(norms, nearest.ids, nearest.scores, masses, strict=True):
            yield Reading(
                norm=_short(norm),
                tokens=tuple(
                    NearToken(
                        id=token_id,
                        text=self._text(backbone, token_id),
                        mass=_short(part),
                        cosine=None if unit is None else _short(score / unit),
                    )
                    for token_id, score, part in zip(ids.tolist(), scores, mass, strict=True)
                ),
                rest=_short(max(0.0, 1.0 - mass.sum())),
            )

    def _text(self, backbone: str, token_id: int) -> str:
        key = backbone, token_id
        if key not in self._texts:
            self._texts[key] = self.tokenizers[backbone].text_of(token_id)
        return self._texts[key]


class _Nearest:
    """The highest scores of N vectors over pieces of a vocabulary, and the sum of all.

    Attributes:
        ids, scores: [N, K], the highest first; of equal ones the lowest id.
        log_totals: [N], log of the sum of exp(score) over all tokens.
    """

    def __init__(self, num_nearest: int, num_vectors: int) -> None:
        self._most = num_nearest
        self.ids: Indices = np.empty((num_vectors, 0), np.int64)
        self.scores: NDArray[np.float64] = np.empty((num_vectors, 0))
        self.log_totals = np.full(num_vectors, -np.inf)

    def add(self, first: int, scores: Floats) -> None:
        """Take the scores [N, n] of the tokens from `first` on."""
        highest = scores.max(axis=1)
        sums = np.exp(scores - highest[:, None]).sum(axis=1, dtype=np.float64)
        self.log_totals = np.logaddexp(self.log_totals, highest + np.log(sums))
        most = min(self._most, scores.shape[1])
        bounds = np.partition(scores, -most, axis=1)[:, -most]
        ids, kept = [], []
        for row, bound in enumerate(bounds):
            places = np.flatnonzero(scores[row] >= bound)
            candidates = np.concatenate([self.ids[row], places + first])
            values = np.concatenate([self.scores[row], scores[row, places]])
            order = np.lexsort((candidates, -values))[: self._most]
            ids.append(candidates[order])
            kept.append(values[order])
        self.ids, self.scores = np.stack(ids), np.stack(kept)


def _read_each(
    vectors: Vectors,
    backbone_of: Callable[[str], str],
    read: Callable[[str, Floats], Iterator[Reading]],
) -> dict[tuple[int, str, int], list[Reading]]:
    """Return what each array of vectors says; those of one backbone are read together."""
    by_backbone: dict[str, list[tuple[int, str, int]]] = {}
    for key in vectors:
        by_backbone.setdefault(backbone_of(key[1]), []).append(key)
    found = {}
    for backbone, keys in by_backbone.items():
        together = np.concatenate([vectors[key] for key in keys])
        _demand_finite(together)
        readings = read(backbone, together)
        found.update({key: list(islice(readings, len(vectors[key]))) for key in keys})
    return found


def _cosines_before(thoughts: Vectors, key: tuple[int, str, int]) -> list[float | None]:
    """Return the cosine of each thought to that of the last round before, for one record."""
    row, agent, round_ = key
    before = [r for r in range(1, round_) if (row, agent, r) in thoughts]
    if not before:
        return [None] * len(thoughts[key])
    _, now = _directions(thoughts[key])
    _, then = _directions(thoughts[row, agent, before[-1]])
    return [_short(cosine) for cosine in np.sum(now * then, axis=1)]


def _directions(vectors: Floats) -> tuple[Floats, Floats]:
    """Return the norms [N] of vectors [N, d], and the vectors of norm 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1)
    return norms, vectors / np.maximum(norms, np.finfo(np.float32).tiny)[:, None]


def _blocks(vectors: Floats, size: int) -> Iterator[Floats]:
    size = max(1, size)
    return (vectors[first : first + size] for first in range(0, len(vectors), size))


def _short(number: float) -> float:
    """Return a number with the six digits that a float32 has."""
    return float(f"{number:.6g}")


def _demand_finite(numbers: Floats) -> None:
    if not np.isfinite(numbers).all():
        raise fail(
            "RM507",
            "thoughts cannot be read: the engine returned numbers that are not finite",
            hint="Run `recmas verify` on the bundle.",
        )
