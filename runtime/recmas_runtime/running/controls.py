"""Message controls: what the answer agent's slots hold in place of the record's own messages.

One definition for training, evaluation and bench. A control changes what the slots of the answer
agent hold in the last round, and nothing else: `null` leaves them empty, `mean` fills them with the
mean of the other records' messages, `shuffled` with the messages of a record with another answer.
What a message is does not matter to `shuffled`: the other agents run for the other record.

Shape legend: M positions of a message (their number may differ), d width of the answer agent.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.engines.interface import Floats
from recmas_runtime.formats.plan import Plan, prompt_fields
from recmas_runtime.prompts.render import field_text
from recmas_runtime.running.records import Record

NULL: Final = "null"
SHUFFLED: Final = "shuffled"
MEAN: Final = "mean"
# The permutation is the same wherever nobody asks for another one.
SEED: Final = 0

_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Which record's messages each record of a set gets.

    Attributes:
        senders: For each record the place of the one whose messages it gets, never its own.
        num_repeated: Records whose sender sends to another record too, because no permutation is
            left: more than half of the records have the same answer.
        same_input: Places of records that get the messages of one that showed an agent the same
            text, because every record with another answer did.
    """

    senders: tuple[int, ...]
    num_repeated: int
    same_input: frozenset[int] = frozenset()


def exchange(
    answers: Sequence[Collection[str]],
    inputs: Sequence[Collection[str]] | None = None,
    *,
    seed: int = SEED,
) -> Exchange:
    """Choose for each record one with another answer: a random permutation of the whole set.

    Args:
        answers: By record all texts that count as right; none where that is not known. They agree
            if their words do, whatever case and punctuation are.
        inputs: By record what each of the sending agents reads (`sender_inputs`): a message about
            the same passage would bring the answer although that is another one.

    Raises:
        RecmasError: RM508 if there is one record only, or a record whose answer all others have.
    """
    num = len(answers)
    if num < 2:
        raise _alone("there is only one")
    right = [frozenset(map(_compared, texts)) for texts in answers]
    read = [frozenset(texts) for texts in inputs or [()] * num]
    # What all records show says nothing about any of them.
    constant = frozenset.intersection(*read)
    read = [texts - constant for texts in read]

    def differ(place: int, other: int) -> bool:
        return place != other and right[place].isdisjoint(right[other])

    def fit(place: int, other: int) -> bool:
        return differ(place, other) and read[place].isdisjoint(read[other])

    # Not for secrets; the same seed gives the same permutation everywhere.
    draw = random.Random(seed)  # noqa: S311
    senders = draw.sample(range(num), num)
    order = draw.sample(range(num), num)
    for place in order:
        if fit(place, senders[place]):
            continue
        for other in order:
            if fit(place, senders[other]) and fit(other, senders[place]):
                senders[place], senders[other] = senders[other], senders[place]
                break
    left = [place for place in order if not fit(place, senders[place])]
    same_input = set()
    for place in left:
        start = draw.randrange(num)
        rotated = [*order[start:], *order[:start]]
        found = next((other for other in rotated if fit(place, other)), None)
        if found is None:
            same_input.add(place)
            found = next((other for other in rotated if differ(place, other)), None)
        if found is None:
            said = next(iter(answers[place]), "")
            raise _alone(f"record {place + 1} of {num} and all others have the answer {said!r}")
        senders[place] = found
    return Exchange(
        senders=tuple(senders),
        num_repeated=num - len(set(senders)),
        same_input=frozenset(same_input),
    )


def sender_inputs(plan: Plan, fields: Mapping[str, object]) -> tuple[str, ...]:
    """Return what other agents read of a record and the answer agent does not, for `exchange`.

    Where that is nothing, what they read. Fields count one by one: two questions about one passage
    are not of different inputs.
    """
    answer = plan.agents[plan.answer_agent]
    others = [agent for name, agent in plan.agents.items() if name != plan.answer_agent]
    read = prompt_fields(others)
    alone = [name for name in read if name not in prompt_fields([answer])]
    found = []
    for name in alone or read:
        try:
            found.append(repr((name, field_text(name, fields))))
        except RecmasError:
            continue  # a record that cannot run sends nothing
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ControlledSet:
    """A set of records that a control is over.

    Attributes:
        senders: By id and place in the input of a record, the one whose messages it gets.
        same_input: Those of `senders` that showed an agent the same text, see `Exchange`.
        mean: The sums of all messages, for `mean`.
    """

    senders: Mapping[tuple[object, int], Record]
    same_input: frozenset[tuple[object, int]]
    mean: MeanMessages | None

    @classmethod
    def of(cls, records: Sequence[Record], found: Exchange, mean: MeanMessages | None) -> Self:
        """Return the set of these records, exchanged as found."""
        senders = {
            _key(record): records[place]
            for record, place in zip(records, found.senders, strict=True)
        }
        same_input = frozenset(_key(records[place]) for place in found.same_input)
        return cls(senders=senders, same_input=same_input, mean=mean)

    def sender(self, record: Record) -> Record:
        """Return the record whose messages another one gets; RM508 if that is none of the set."""
        if _key(record) not in self.senders:
            raise fail(
                "RM508",
                f"record {record.id!r} is not among those that the control is over",
                hint="Give `over` every record that is asked.",
            )
        return self.senders[_key(record)]

    def has_same_input(self, record: Record) -> bool:
        """Return whether the sender of a record showed an agent the same text."""
        return _key(record) in self.same_input


def _key(record: Record) -> tuple[object, int]:
    return record.id, record.index


def _compared(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold())) or text.strip()


def _alone(why: str) -> RecmasError:
    return fail(
        "RM508",
        f"{SHUFFLED} and {MEAN} need the messages of a record with another answer, and {why}",
        hint="Give at least two records with different answers.",
    )


@dataclass
class MeanMessages:
    """The sums of a set's messages, of which each record gets the mean without its own."""

    num_records: int = 0
    _sums: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)
    _counts: dict[str, list[int]] = field(default_factory=dict)
    _lengths: dict[str, int] = field(default_factory=dict)

    def add(self, messages: Mapping[str, Floats]) -> None:
        """Add what a record's slots hold: by slot its message [M, d]."""
        self.num_records += 1
        for slot, message in messages.items():
            sums = self._sums.setdefault(slot, [])
            counts = self._counts.setdefault(slot, [])
            self._lengths[slot] = self._lengths.get(slot, 0) + len(message)
            for place, vector in enumerate(message):
                if place == len(sums):
                    sums.append(np.zeros(len(vector)))
                    counts.append(0)
                sums[place] = sums[place] + vector
                counts[place] += 1

    def of_others(self, slot: str, own: Floats) -> Floats:
        """Return the mean of the other records' messages [M, d], position by position.

        It is as long as theirs are on average, and its vectors are the means over those that have
        the position.

        Args:
            own: The record's message in this slot, one of those that were added.
        """
        others = self.num_records - 1
        assert others > 0, "a mean of the other records needs some"
        length = round((self._lengths[slot] - len(own)) / others)
        mean = np.zeros((length, own.shape[1]), np.float32)
        for place in range(length):
            total, count = self._sums[slot][place], self._counts[slot][place]
            if place < len(own):
                total, count = total - own[place], count - 1
            mean[place] = total / count
        return mean
