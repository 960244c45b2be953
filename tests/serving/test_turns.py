"""Conversations as turns, from the spec to answers: as transformers writes and continues them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM, AutoTokenizer

import recmas_runtime as rt
from kit.bundles import BuildTiny
from kit.specs import SEQUENTIAL
from recmas_runtime.formats.plan import PrefillStep, ServePlan
from recmas_runtime.prompts.earlier_turns import EarlierTurn
from recmas_runtime.running.records import Record
from recmas_runtime.serve.conversation import to_record
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import Ask, Done

ALONE = """\
recmas: 1
name: alone
backbones: {one: {source: ./FAMILY}}
agents: {solver: {backbone: one, system: Be brief., prompt: "Now {{ question }}"}}
answer: {agent: solver, max_new_tokens: 12}
serve: {history: turns}
"""
TURNS = (
    EarlierTurn(role="user", content="one"),
    EarlierTurn(role="assistant", content="the plan and then two"),
    EarlierTurn(role="user", content="three"),
)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    *({"role": turn.role, "content": turn.content} for turn in TURNS[:2]),
    {"role": "user", "content": "Now three"},
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_an_answer_is_what_transformers_writes(
    build_tiny: BuildTiny, families: Path, family: str
) -> None:
    bundle = build_tiny(ALONE.replace("FAMILY", family)).bundle
    tokenizer = AutoTokenizer.from_pretrained(families / family)
    model = AutoModelForCausalLM.from_pretrained(families / family, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    written = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)

    async def ask() -> Done:
        service = await LocalService.start({"one": str(bundle)}, device="cpu", threads=1)
        try:
            info = service.models["one"]
            assert info.serve == ServePlan(fields={"question": "last_user"}, history="turns")
            record, turns = to_record(TURNS, info.serve, info.fields, {})
            asked = Ask(id=0, model="one", record=record, turns=turns)
            *_, done = [event async for event in service.ask(asked)]
            assert isinstance(done, Done)
            return done
        finally:
            await service.close(0.0)

    answer = asyncio.run(ask()).answer
    assert answer["answer"] == expected
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_prompts_behind_turns_are_reused_across_rounds(build_tiny: BuildTiny) -> None:
    """And what is reused changes nothing."""
    system = rt.load(build_tiny(SEQUENTIAL).bundle, device="cpu", threads=1)
    anew = system.with_plan(
        structs.replace(
            system.plan,
            steps=tuple(
                structs.replace(step, reuse_prefix=False, prefix_from=None)
                if isinstance(step, PrefillStep)
                else step
                for step in system.plan.steps
            ),
        )
    )
    record = Record(id="1", fields={"question": "three"}, turns=TURNS[:2])
    found, expected = system.run(record), anew.run(record)
    assert found.answer == expected.answer
    assert found.usage.prompt_tokens < expected.usage.prompt_tokens
    plain = Record(id="1", fields={"question": "three"})
    assert found.answer != system.run(plain).answer  # the turns are read
    assert [each.answer for each in system.run([record, plain])] == [
        found.answer,
        system.run(plain).answer,
    ]
