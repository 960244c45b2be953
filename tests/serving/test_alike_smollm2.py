"""Two hundred prompts on the real model, many at a time, are answered as each of them alone.

`RECMAS_SERVING_BUNDLE=DIR` takes a bundle that is there in place of building one.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import recmas_runtime as rt
from kit.alike import Outcome, Request, alone, compare, served
from kit.word_problems import word_problems
from recmas_compiler import api
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.service import ServiceLimits

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 200
MOST_TOKENS = 32
# All of them at once, so that the engines are full until the last ones.
LIMITS = ServiceLimits(max_batch=8, max_queue=NUM_PROMPTS)
# Texts that may differ because two tokens are about as likely.
MOST_TIES = 0.03
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three agents that hand over thoughts for three rounds, on SmolLM2 in float32."""
    if (given := os.environ.get("RECMAS_SERVING_BUNDLE")) is not None:
        return Path(given)
    program = api.load_and_compile(ROOT / "benchmarks" / "specs" / "sequential.yaml")
    return api.build(program, tmp_path_factory.mktemp("serving") / "bundle")


@pytest.mark.parametrize("name", SAMPLINGS)
def test_two_hundred_prompts(name: str, bundle: Path) -> None:
    chance = random.Random(name)
    with rt.load(bundle, threads=1) as system:
        requests = [
            Request(
                record={"question": question},
                model="smollm2",
                sampling={
                    **SAMPLINGS[name],
                    "max_new_tokens": chance.randint(8, MOST_TOKENS),
                    "seed": number,
                },
                rounds=chance.randint(1, system.plan.rounds),
                delay_s=chance.uniform(0.0, 2.0),
            )
            for number, question in enumerate(questions_for(system))
        ]
        found = asyncio.run(ask_all(bundle, requests))
        expected = [alone(system, request) for request in requests]
        tally = compare(system, requests, expected, found)
    print(f"{name}: {tally.num_alike} of {NUM_PROMPTS} alike; ties: {tally.ties}")
    assert tally.num_compared == NUM_PROMPTS
    assert len({outcome.text for outcome in expected}) > NUM_PROMPTS // 2
    assert len(tally.ties) <= MOST_TIES * NUM_PROMPTS


def questions_for(system: rt.System) -> Iterator[str]:
    """Yield problems of different lengths that the bundle has room for."""
    num_found = 0
    for question in word_problems(3 * NUM_PROMPTS, most=12):
        try:
            system.prompts(rt.Record(id="1", fields={"question": question}))
        except rt.RecmasError:
            continue
        yield question
        num_found += 1
        if num_found == NUM_PROMPTS:
            return


async def ask_all(bundle: Path, requests: list[Request]) -> list[Outcome | None]:
    service = await LocalService.start({"smollm2": str(bundle)}, LIMITS, threads=1)
    try:
        return await asyncio.gather(*(served(service, each) for each in requests))
    finally:
        await service.close(0.0)
