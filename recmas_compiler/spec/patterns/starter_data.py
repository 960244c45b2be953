"""Small records to learn from and to ask, which `recmasc init --train` writes beside a spec.

They are made here, so that a first training needs nothing from elsewhere: always the same ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

TRAIN_FILE: Final = "train.jsonl"
QUESTIONS_FILE: Final = "questions.jsonl"
PROTOCOL_FILE: Final = "protocol.yaml"

Record = dict[str, str | list[str]]

COLORS: Final = (
    *("red", "blue", "green", "yellow", "orange", "purple"),
    *("pink", "black", "white", "brown", "gray", "gold"),
)
_THINGS: Final = (
    *("ball", "box", "car", "hat", "door", "cup", "chair", "boat", "coat", "lamp"),
    *("book", "bike", "key", "bag", "vase", "kite", "sock", "drum", "fence", "train"),
)
# Asked about only: what is learned has to hold for things that were never seen.
_OTHER_THINGS: Final = ("shoe", "tent", "desk", "bowl", "sofa", "bell")
_NUM_QUESTIONS: Final = 40

_NAMES: Final = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo")
_GOODS: Final = ("apples", "books", "coins", "pens", "shells", "stamps")
_NUM_SUMS: Final = 96
_NUM_ASKED_SUMS: Final = 8


def color_records() -> tuple[list[Record], list[Record]]:
    """Return what the starter `relay` learns from and is asked: colors that one agent sees."""
    learned = [(thing, color) for thing in _THINGS for color in COLORS]
    random.Random(0).shuffle(learned)  # noqa: S311 - no secret
    # Neighbours ask for different colors, so that another question's message is a wrong one.
    asked = [
        (_OTHER_THINGS[(n + n // len(COLORS)) % len(_OTHER_THINGS)], COLORS[n % len(COLORS)])
        for n in range(_NUM_QUESTIONS)
    ]
    return _notes("color", learned), _notes("asked", asked)


def _notes(name: str, pairs: list[tuple[str, str]]) -> list[Record]:
    return [
        {
            "id": f"{name}-{number}",
            "note": f"{color} is the color of the {thing}.",
            "question": f"What color is the {thing}?",
            "answer": color,
        }
        for number, (thing, color) in enumerate(pairs)
    ]


def _sums() -> Iterator[tuple[str, str, int]]:
    """Yield word problems without end: the question, the way, the number."""
    draw = random.Random(0)  # noqa: S311 - no secret
    while True:
        name, goods = draw.choice(_NAMES), draw.choice(_GOODS)
        has, more = draw.randint(6, 40), draw.randint(2, 30)
        if draw.random() < 0.5:
            question = f"{name} has {has} {goods} and gets {more} more."
            yield f"{question} How many has {name} now?", f"{has} + {more}", has + more
        else:
            more = min(more, has - 1)
            question = f"{name} has {has} {goods} and gives {more} away."
            yield f"{question} How many are left?", f"{has} - {more}", has - more


def sum_records(answer: Callable[[str, int], str]) -> tuple[list[Record], list[Record]]:
    """Return word problems to learn from and others to ask.

    Args:
        answer: Writes the text to learn, of the way and the number.
    """
    found: dict[str, Record] = {}
    for question, way, number in _sums():
        record: Record = {"question": question, "answer": answer(way, number)}
        found.setdefault(question, {"id": f"sum-{len(found)}", **record})
        if len(found) == _NUM_SUMS + _NUM_ASKED_SUMS:
            break
    records = list(found.values())
    return records[:_NUM_SUMS], records[_NUM_SUMS:]


# task -> how its answers are written; other tasks need data of one's own
ANSWERS: Final[Mapping[str, Callable[[str, int], str]]] = {
    "general": lambda way, number: f"{way} = {number}\n{number}",
    "math": lambda way, number: f"{way} = {number}. The answer is \\boxed{{{number}}}.",
}


# Invented, so that no model knows them: two facts, and a question that needs both.
_HOPS: Final = (
    (
        "Mira lives in the lighthouse of Garrow.",
        "The lighthouse of Garrow is painted green.",
        "What color is the house that Mira lives in?",
        "green",
    ),
    (
        "Old Tom repairs clocks in Fennick.",
        "Fennick lies on the river Sade.",
        "On which river is the town where Old Tom works?",
        "Sade",
    ),
    (
        "The ship Petrel belongs to Captain Rook.",
        "Captain Rook comes from the island of Ulla.",
        "From which island is the owner of the Petrel?",
        "Ulla",
    ),
    (
        "Nadia plays the cello in the Brigg Quartet.",
        "The Brigg Quartet rehearses in a bakery.",
        "Where does Nadia's quartet rehearse?",
        "in a bakery",
    ),
    (
        "The key to the archive hangs in room 12.",
        "Room 12 is cleaned by Osman.",
        "Who cleans the room with the key to the archive?",
        "Osman",
    ),
    (
        "Pim's horse is called Juniper.",
        "Juniper won the race at Carrow in 1962.",
        "In which year did Pim's horse win at Carrow?",
        "1962",
    ),
    (
        "The bridge at Tolle was designed by Ines Varga.",
        "Ines Varga studied in Lund.",
        "Where did the designer of the bridge at Tolle study?",
        "Lund",
    ),
    (
        "Uncle Bert collects stamps from Samoa.",
        "His rarest stamp from Samoa shows a parrot.",
        "What does Uncle Bert's rarest stamp show?",
        "a parrot",
    ),
    (
        "The mill at Sorn grinds barley.",
        "All barley of Sorn is sold to the Halden brewery.",
        "To whom is what the mill at Sorn grinds sold?",
        "the Halden brewery",
    ),
    (
        "Leah's telescope points at the star Keth.",
        "The star Keth has three planets.",
        "How many planets has the star that Leah watches?",
        "three",
    ),
    (
        "The choir of Dorn sings on Thursdays.",
        "On Thursdays the hall is heated with peat.",
        "With what is the hall heated when the choir of Dorn sings?",
        "peat",
    ),
    (
        "Arlo's grandfather was a cooper.",
        "The coopers of the valley wore blue aprons.",
        "What color was the apron of Arlo's grandfather?",
        "blue",
    ),
)
_ASKED_HOPS: Final = (
    (
        "Wilma's ferry crosses the strait of Ree.",
        "The strait of Ree is nine miles wide.",
        "How many miles does Wilma's ferry cross?",
        "nine",
    ),
    (
        "The painter Sol lives above a pharmacy.",
        "The only pharmacy stands in Elm Street.",
        "In which street does the painter Sol live?",
        "Elm Street",
    ),
    (
        "Professor Quill keeps bees of the breed Amber.",
        "Bees of the breed Amber eat heather.",
        "What do the bees of Professor Quill eat?",
        "heather",
    ),
    (
        "The village band is led by Greta Moss.",
        "Greta Moss plays the tuba.",
        "Which instrument does the leader of the village band play?",
        "the tuba",
    ),
    (
        "The north gate is guarded by a dog named Flint.",
        "Flint is afraid of geese.",
        "Of what is the guard of the north gate afraid?",
        "geese",
    ),
    (
        "Ruben's train leaves from platform 4.",
        "Platform 4 is under the clock tower.",
        "Under what does Ruben's train leave?",
        "the clock tower",
    ),
)


def split_records() -> tuple[list[Record], list[Record]]:
    """Return what the starters `split` learn from and are asked: two facts, alone and together."""
    return _hops("hop", _HOPS), _hops("asked", _ASKED_HOPS)


def _hops(name: str, rows: Sequence[tuple[str, str, str, str]]) -> list[Record]:
    return [
        {
            "id": f"{name}-{number}",
            "facts": [first, second],
            "context": f"{first} {second}",
            "question": question,
            "answer": answer,
        }
        for number, (first, second, question, answer) in enumerate(rows)
    ]


def as_lines(records: list[Record]) -> str:
    """Return records as JSON lines."""
    return "".join(f"{json.dumps(record)}\n" for record in records)


def color_protocol() -> str:
    """Return how `recmasc eval` asks about colors and tells right from wrong."""
    return (
        "# How `recmasc eval` asks and checks; the shipped ones are in docs/evaluation.md.\n"
        "name: colors\n"
        "version: 1\n"
        "description: The color that only the first agent sees.\n"
        "data:\n"
        "  source: recmasc init relay --train\n"
        "  split: questions\n"
        "  fields: {note: [note], question: [question]}\n"
        "  gold: {answer: [answer]}\n"
        "max_new_tokens: 8\n"
        f"check: {{kind: exact, among: [{', '.join(COLORS)}]}}\n"
    )
