"""Grade-school word problems of any length, all different, without a data set."""

from __future__ import annotations

import random

_PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ivy", "Jack")
_THINGS = ("apples", "books", "cups", "eggs", "loaves", "marbles", "pens", "stamps", "tickets")
_SENTENCES = (
    "{who} has {a} {what}.",
    "{who} buys {a} boxes with {b} {what} in each of them.",
    "On {day} {who} gives {a} {what} to a friend and keeps the rest.",
    "Each of the {what} costs {a} dollars, and {who} pays for {b} of them.",
    "{who} loses half of the {what}, finds {a} again and borrows another {b}.",
    "After {a} days {who} has {b} times as many {what} as at the beginning.",
    "{who} packs {a} {what} into every bag and needs {b} bags for all of them.",
    "Every week {who} sells {a} {what} for {b} dollars and buys {c} new ones.",
)
_ENDS = (
    "How many {what} does {who} have in the end?",
    "How much money does {who} have left?",
    "How many {what} are there in total?",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def word_problem(number: int, sentences: int) -> str:
    """Return a problem of so many sentences before its question; the same for equal arguments."""
    chance = random.Random(f"{number} {sentences}")
    who, what = chance.choice(_PEOPLE), chance.choice(_THINGS)

    def filled(text: str) -> str:
        day = chance.choice(_DAYS)
        a, b, c = (chance.randint(2, 60) for _ in range(3))
        return text.format(who=who, what=what, day=day, a=a, b=b, c=c)

    said = [filled(chance.choice(_SENTENCES)) for _ in range(sentences)]
    return " ".join([*said, filled(chance.choice(_ENDS))])


def word_problems(count: int, *, least: int = 1, most: int = 20, seed: int = 0) -> list[str]:
    """Return problems of `least` to `most` sentences, short ones more often than long ones."""
    chance = random.Random(seed)
    spread = most - least + 1
    return [
        word_problem(seed * 100_000 + number, least + int(spread * chance.random() ** 2))
        for number in range(count)
    ]
