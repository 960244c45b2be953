"""Texts that the answer agent's backbone reads on its own: as likely as transformers finds them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recmas_runtime as rt
from kit.bundles import BuildTiny
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.running import scoring
from recmas_runtime.serve.local import LocalService
from recmas_runtime.serve.protocol import Ask, Read, Step
from recmas_runtime.serve.service import ServiceError

# Characters of several bytes, of several tokens each, and space that tokenizers treat apart.
TEXT = "The plan  and then\n\n h\u00e9llo \U0001f389\U0001f9ee. " * 3


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(build_tiny: BuildTiny, family: str) -> Path:
    return build_tiny(SPEC.replace("FAMILY", family)).bundle


@pytest.fixture(scope="module")
def system(bundle: Path) -> rt.System:
    return rt.load(bundle, device="cpu", threads=1)


SPEC = """\
recmas: 1
name: reads
backbones: {one: {source: ./FAMILY}}
agents: {solver: {backbone: one, prompt: "{{ question }}"}}
answer: {agent: solver}
"""


def of_transformers(folder: Path, ids: list[int]) -> tuple[np.ndarray, float]:
    """Return log likelihoods [S, V] behind each token, and by how much ours may differ."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    allowed = 2 * TOLERANCES["logits_relative"] * float(logits.abs().max())
    return torch.log_softmax(logits, dim=-1).numpy(), allowed


@pytest.mark.parametrize("chunk", [7, 128])
def test_texts_are_as_likely_as_with_transformers(
    family: str,
    families: Path,
    system: rt.System,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "_CHUNK", chunk)
    monkeypatch.setattr(scoring, "_MOST_LOGITS", 3 * 400)
    tokenizer = AutoTokenizer.from_pretrained(families / family)
    ids = tokenizer(TEXT)["input_ids"]
    read = system.read_text(TEXT, top=3)
    assert [token.id for token in read] == ids
    told, allowed = of_transformers(families / family, ids)
    assert read[0].logprob is None
    assert read[0].top == ()
    for place, token in enumerate(read[1:]):
        assert token.logprob == pytest.approx(told[place, ids[place + 1]], abs=allowed)
        best = np.sort(told[place])[::-1][:3]
        assert [logprob for _, logprob in token.top] == pytest.approx(best, abs=allowed)
        if token.id == int(told[place].argmax()):
            assert token.top[0][1] == token.logprob  # the same number, as who compares them expects


def test_tokens_are_told_with_their_place_in_the_text(system: rt.System) -> None:
    read = system.read_text(TEXT)
    assert "".join(token.text for token in read) == TEXT
    for token in read:
        assert TEXT[token.offset :].startswith(token.text)
    ids = [token.id for token in read]
    again = system.read_text(ids)  # nothing is put before ids
    assert [token.id for token in again] == ids
    assert [token.logprob for token in again] == [token.logprob for token in read]
    assert "".join(token.text for token in again).lstrip(" ") == TEXT
    at = 0
    for token in again:
        assert token.offset == at
        at += len(token.text)


def test_what_the_tokenizer_puts_before_texts_is_read(
    family: str, families: Path, system: rt.System
) -> None:
    bos = AutoTokenizer.from_pretrained(families / family)("")["input_ids"]
    assert bool(bos) is (family != "qwen3")
    read = system.read_text("the plan")
    assert [token.id for token in read[: len(bos)]] == bos
    assert [(token.text, token.offset, token.logprob) for token in read[: len(bos)]] == [
        ("", 0, None)
    ] * len(bos)
    assert (read[len(bos)].logprob is None) is (not bos)


def test_what_cannot_be_read_is_named(system: rt.System) -> None:
    entry = system.manifest.backbones["one"]
    most = entry.max_positions
    assert len(system.read_text([5] * most)) == most
    for text, told in (
        ((), "RM500.*the text is empty"),
        ("x\ud800", "RM500.*half a surrogate pair"),
        ([5, entry.vocab_size], f"RM500.*no embedding for token {entry.vocab_size}"),
        ([5, -1], "RM500.*no embedding for token -1"),
        ([5] * (most + 1), f"RM501.*the text has {most + 1} tokens, the backbone has {most} pos"),
        ("x" * 10**7, f"RM501.*the text has 10000000 characters, the backbone has {most} pos"),
    ):
        with pytest.raises(RecmasError, match=told):
            system.read_text(text)
    assert system.read_text([5], top=10**6)[0].top == ()
    assert len(system.read_text([5, 6], top=10**6)[1].top) == entry.vocab_size


def test_a_service_reads_texts_beside_answers(bundle: Path, system: rt.System) -> None:
    """With the same figures, whatever else runs in the same engine calls."""
    texts = [TEXT, "the plan", TEXT[5:] + TEXT, "x"]

    async def ask() -> None:
        service = await LocalService.start({"one": str(bundle)}, device="cpu", threads=1)
        try:
            reads = [service.read(Read(id=0, model="one", text=text, top=2)) for text in texts]
            asked = Ask(
                id=0, model="one", record={"question": "the"}, sampling={"max_new_tokens": 9}
            )
            *told, answer = await asyncio.gather(*reads, anext(service.ask(asked)))
            assert isinstance(answer, Step)
            for text, was_read in zip(texts, told, strict=True):
                alone = system.read_text(text, top=2)
                least = min(token.logprob or 0.0 for token in alone)
                allowed = 2 * TOLERANCES["logits_relative"] * abs(least)
                assert [token.id for token in was_read.tokens] == [token.id for token in alone]
                assert [token.offset for token in was_read.tokens] == [t.offset for t in alone]
                for token, expected in zip(was_read.tokens[1:], alone[1:], strict=True):
                    assert token.logprob == pytest.approx(expected.logprob, abs=allowed)
                    assert token.top[0][1] == pytest.approx(expected.top[0][1], abs=allowed)
            with pytest.raises(ServiceError, match="RM500: the text is empty") as refused:
                await service.read(Read(id=0, model="one", text=()))
            assert refused.value.reason == "input"
        finally:
            await service.close(0.0)

    asyncio.run(ask())
