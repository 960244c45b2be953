"""Ten samples whose answers the hand-made bundle knows, for `inspect eval`."""

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser
from inspect_ai.scorer import match
from inspect_ai.solver import generate

LETTERS = "abcdefghij"


def asked(samples: list[Sample]) -> Task:
    return Task(dataset=samples, solver=generate(), scorer=match(location="exact"))


def samples() -> list[Sample]:
    return [
        Sample(input=f"Number {n}: what follows {n}", target=letter, id=n)
        for n, letter in enumerate(LETTERS)
    ]


@task
def letters() -> Task:
    return asked(samples())


@task
def conversations() -> Task:
    turns = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="what follows 3")]
    return asked([Sample(input=turns, target="d")])


@task
def long_questions() -> Task:
    return asked([Sample(input="x" * 400, target="x")])
