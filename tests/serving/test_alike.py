"""Many requests at once, of every kind of system, are answered as each of them alone.

`RECMAS_ALIKE_SEED=7` draws other requests.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import recmas_runtime as rt
from kit.alike import (
    Choice,
    Outcome,
    Request,
    Tally,
    alone,
    any_sampling,
    compare,
    find_tie,
    served,
    usable_baselines,
)
from kit.bundles import BuildTiny, Built
from kit.fixtures import exports_once, one_thread
from kit.message_specs import CONTEXTS, QUESTIONS
from kit.message_specs import SPECS as OF_MESSAGES
from kit.specs import SPECS as OF_THOUGHTS
from kit.zoo import write_zoo_model
from recmas_runtime.formats.plan import SamplingPlan
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.service import ServiceLimits

__all__ = ["exports_once", "one_thread"]

SPECS = {
    **{name: OF_THOUGHTS[name] for name in ("sequential", "mixture", "heterogeneous")},
    **OF_MESSAGES,
    "snapshots": OF_THOUGHTS["mixture"].replace("source: llama", "source: state"),
}
# Rows of many requests side by side; room for few kept blocks of prompts, which come and go; little
# room of any kind, with prompts in small pieces.
LIMITS = {
    "wide": ServiceLimits(max_batch=16, max_queue=64),
    "evicting": ServiceLimits(max_batch=6, max_queue=64, kept_bytes=150_000, chunk=16),
    "narrow": ServiceLimits(max_batch=3, max_queue=64, kept_bytes=0, chunk=7),
}
LONG = "Anna has three plans and an orange. Which of the plans is the best one, and why? " * 3
NUM_REQUESTS = 28
MOST_TOKENS = 14
SEED = os.environ.get("RECMAS_ALIKE_SEED", "")
# Requests whose texts may differ because two tokens are about as likely.
MOST_TIES = 0.1


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, families: Path) -> Path:
    """A folder with the tiny families, and `state` of gated DeltaNet."""
    root = tmp_path_factory.mktemp("alike")
    write_zoo_model(root / "state", "qwen3_5_text")
    for family in families.iterdir():
        (root / family.name).symlink_to(family)
    return root


@pytest.mark.parametrize("name", SPECS)
def test_requests_beside_others_and_alone(name: str, build_tiny: BuildTiny, folder: Path) -> None:
    built = build_tiny(SPECS[name], base_dir=folder)
    requests = any_requests(built.system, random.Random(name + SEED))
    expected = [alone(built.system, request) for request in requests]
    texts = {outcome.text for outcome in expected if not outcome.codes}
    assert len(texts) > NUM_REQUESTS // 3, "texts that prove nothing"
    for limits in LIMITS.values():
        tally = compare(built.system, requests, expected, ask_all(built, requests, limits))
        assert tally.num_failed >= 2
        assert tally.num_compared + tally.num_left + tally.num_failed == NUM_REQUESTS
        assert tally.num_compared > NUM_REQUESTS // 2
        assert len(tally.ties) <= MOST_TIES * tally.num_compared, tally.ties


def test_answers_of_one_record(build_tiny: BuildTiny, folder: Path) -> None:
    """The index of an answer joins the seed, so that several of one question differ."""
    built = build_tiny(SPECS["sequential"], base_dir=folder)
    sampling = {"temperature": 1.5, "seed": 3, "max_new_tokens": 12}
    requests = [
        Request(record={"question": "Why?"}, sampling=sampling, index=index) for index in range(4)
    ]
    expected = [alone(built.system, request) for request in requests]
    assert len({outcome.text for outcome in expected}) == len(requests)
    compare(built.system, requests, expected, ask_all(built, requests, LIMITS["wide"]))


@pytest.mark.parametrize("name", ["sequential", "every kind", "an early end", "layer states"])
def test_records_of_a_file(name: str, build_tiny: BuildTiny, folder: Path) -> None:
    system = build_tiny(SPECS[name], base_dir=folder).system
    sampling = {"temperature": 1.2, "seed": 5, "max_new_tokens": MOST_TOKENS}
    given = [full_record(number, times=1 + number % 3) for number in range(10)]
    given[3] = {}
    requests = [
        Request(record=record, sampling=sampling, index=index) for index, record in enumerate(given)
    ]
    expected = [alone(system, request) for request in requests]
    found = [*map(Outcome.of_result, system.answer_all(given, at_once=4, **sampling))]
    tally = compare(system, requests, expected, found)
    assert (tally.num_compared, tally.num_failed) == (9, 1)


def test_two_systems_in_one_service(build_tiny: BuildTiny, folder: Path) -> None:
    """One of three agents in a row, and one of agents side by side, which has other backbones."""
    names = ("sequential", "every kind")
    systems = {name: build_tiny(SPECS[name], base_dir=folder) for name in names}
    requests = {
        name: [replace(each, model=name) for each in any_requests(built.system, random.Random(7))]
        for name, built in systems.items()
    }
    mixed = [each for pair in zip(*requests.values(), strict=True) for each in pair]
    found = asyncio.run(ask_service(systems, mixed, LIMITS["wide"]))
    for place, (name, built) in enumerate(systems.items()):
        expected = [alone(built.system, request) for request in requests[name]]
        tally = compare(built.system, requests[name], expected, found[place :: len(systems)])
        assert tally.num_compared > NUM_REQUESTS // 2


def test_another_answer_is_no_tie(build_tiny: BuildTiny, folder: Path) -> None:
    built = build_tiny(SPECS["every kind"], base_dir=folder)
    request = Request(record=full_record(0), sampling={"max_new_tokens": 10})
    wanted = alone(built.system, request)
    for changed in (
        replace(wanted, text=f"{wanted.text[:3]}{wanted.text[4:]}"),
        replace(wanted, text=wanted.text[:-1]),
        replace(wanted, text=f"{wanted.text}."),
        replace(wanted, rounds=1),
    ):
        assert find_tie(built.system, request, wanted, changed) is None
        with pytest.raises(AssertionError, match="request 0"):
            compare(built.system, [request], [wanted], [changed])
    assert compare(built.system, [request], [wanted], [wanted]) == Tally(num_alike=1)


def test_choices_that_are_close() -> None:
    greedy, hot = SamplingPlan(), SamplingPlan(temperature=1.0)
    assert choice([1.0, 3.0, 2.99999], greedy).is_close()
    assert not choice([1.0, 3.0, 2.99], greedy).is_close()
    drawn = np.random.Generator(np.random.Philox(5)).random()
    near = np.log([drawn + 1e-6, 1 - drawn - 1e-6])  # the draw falls right on the border of both
    far = np.log([drawn / 2, 1 - drawn / 2])
    assert choice(near, hot).is_close()
    assert not choice(far, hot).is_close()


def choice(logits: Sequence[float], sampling: SamplingPlan) -> Choice:
    stream = np.random.Generator(np.random.Philox(5))
    given = np.array(logits, np.float32)
    return Choice(logits=given, sampling=sampling, stream=stream, written=frozenset())


def ask_all(
    built: Built, requests: Sequence[Request], limits: ServiceLimits
) -> list[Outcome | None]:
    """Ask a service of one system everything at once."""
    return asyncio.run(ask_service({"tiny": built}, requests, limits))


async def ask_service(
    systems: Mapping[str, Built], requests: Sequence[Request], limits: ServiceLimits
) -> list[Outcome | None]:
    """Ask a service everything at once, and its first request once more in the end."""
    bundles = {name: str(built.bundle) for name, built in systems.items()}
    async with asyncio.timeout(120):
        service = await LocalService.start(bundles, limits, threads=1)
        try:
            found = await asyncio.gather(*(served(service, request) for request in requests))
            assert service.num_open == 0
            # Nobody's leaving hurts those who come later.
            again = replace(requests[0], delay_s=0.0, num_events=None, patience_s=None)
            system = systems[again.model].system
            compare(system, [again], [alone(system, again)], [await served(service, again)])
            await shared_steps(service)
            return found
        finally:
            await service.close(0.0)


async def shared_steps(service: LocalService) -> None:
    """Wait until the engines tell that rows of several requests ran in one step."""
    async with asyncio.timeout(10):  # what they last told may be a second old
        while service.gauges is None or set(service.gauges.rows_per_step) <= {"1"}:
            await asyncio.sleep(0.01)


def any_requests(system: rt.System, chance: random.Random) -> list[Request]:
    """Draw requests that differ in all that a request may say; two of them are refused."""
    baselines = usable_baselines(system)
    requests = []
    for number in range(NUM_REQUESTS):
        request = Request(
            record=full_record(number, times=chance.choice((1, 1, 2, 3))),
            sampling=any_sampling(chance, MOST_TOKENS),
            rounds=chance.choice((None, None, None, *range(1, system.plan.rounds + 1))),
            baseline=chance.choice(baselines) if chance.random() < 0.25 else "latent",
            index=chance.choice((0, 0, 1, 7)),
            delay_s=chance.expovariate(60.0),
        )
        leaves = chance.random()
        if leaves < 0.1:
            request = replace(request, num_events=chance.randint(1, 8))
        elif leaves < 0.2:
            request = replace(request, patience_s=chance.uniform(0.0, 0.1))
        elif leaves < 0.25:
            request = replace(request, sampling={**request.sampling, "stop": ("a", "e b")})
        requests.append(request)
    plain = {"num_events": None, "patience_s": None}
    requests[5] = replace(requests[5], record={}, **plain)
    requests[11] = replace(requests[11], sampling={"temperature": -1.0}, **plain)
    return requests


def full_record(number: int, *, times: int = 1) -> dict[str, object]:
    """Return a record with all fields that the specs show, the question about so many times."""
    question, context = QUESTIONS[number % len(QUESTIONS)], CONTEXTS[number // 2 % len(CONTEXTS)]
    if times > 1:
        question = f"{number}. {LONG[: 40 * times]} {question}"
    return {"question": question, "context": context, "facts": [question, context]}
