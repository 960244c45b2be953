"""LatentMAS as `recmasc init` writes it is the published rule, computed plainly.

The plain computation is transformers and nothing else: one cache that grows through the agents, and
thoughts through the matrix of head and embeddings. Where agents are side by side each has a cache
of its own, at the positions at which its rows are handed over.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import recmas_runtime as rt
from kit.bundles import BuildTiny, tiny_builder
from kit.files import MadeOnce
from kit.models import write_tiny_backbone
from recmas_compiler.spec.patterns.starter_specs import starter_spec
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.formats.layers import cache_tensors
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.sequences.sequence_batch import Rows, SequenceBatch

QUESTIONS = ("What is 7 * 8?", "x", "Anna has three plans and an orange. Which plan is best?")
STEPS, MAX_NEW_TOKENS = 10, 10


def spec_text(form: str, family: str) -> str:
    text = starter_spec("latentmas", task=form)
    text = text.replace("source: builtin:smollm2-135m-instruct", f"source: {family}")
    text = text.replace("max_new_tokens: 256", f"max_new_tokens: {MAX_NEW_TOKENS}")
    return text.replace("max_prompt_tokens: 2048", "max_prompt_tokens: 640")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas whose head is a table of its own, and whose head is the embeddings."""
    folder = tmp_path_factory.mktemp("families")
    write_tiny_backbone(folder / "untied", "llama", seed=3, tie_word_embeddings=False)
    write_tiny_backbone(folder / "tied", "llama", seed=3, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def build_tiny(
    folder: Path, made_once: MadeOnce, tmp_path_factory: pytest.TempPathFactory
) -> BuildTiny:
    return tiny_builder(folder, made_once, lambda: tmp_path_factory.mktemp("bundles") / "bundle")


class Plain:
    """The published rule over one model of transformers."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        table = self.model.get_input_embeddings().weight.detach().double()
        head = self.model.get_output_embeddings().weight.detach().double()
        gram = head.T @ head + 1e-5 * torch.eye(head.shape[1], dtype=torch.float64)
        self.matrix, self.length = torch.linalg.inv(gram) @ head.T @ table, table.norm(dim=1).mean()

    def ids(self, prompt: str, question: str) -> Tensor:
        user = re.sub(r"\{\{ latent\.\w+ \}\}", "", prompt).replace("{{ question }}", question)
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def step(self, cache: DynamicCache, start: int, **given: Tensor) -> tuple[Tensor, Tensor]:
        """Go on at a position; returns the last state after the final norm, and the logits."""
        (what,) = given.values()
        position_ids = torch.arange(start, start + what.shape[1])[None]
        out = self.model(
            **given, past_key_values=cache, position_ids=position_ids, output_hidden_states=True
        )
        return out.hidden_states[-1][:, -1], out.logits[:, -1]

    def think(self, cache: DynamicCache, ids: Tensor, *, start: int) -> int:
        """Read a prompt and think; returns the position behind the last thought."""
        hidden, _ = self.step(cache, start, input_ids=ids)
        start += ids.shape[1]
        for _ in range(STEPS):
            mapped = hidden.double() @ self.matrix
            embed = (mapped * self.length / mapped.norm(dim=1, keepdim=True)).float()
            hidden, _ = self.step(cache, start, inputs_embeds=embed[:, None])
            start += 1
        return start

    def write(self, cache: DynamicCache, ids: Tensor, *, start: int) -> list[int]:
        """Read a prompt and write greedily."""
        written: list[int] = []
        stops = self.model.generation_config.eos_token_id
        for _ in range(MAX_NEW_TOKENS):
            _, logits = self.step(cache, start, input_ids=ids)
            start, ids = start + ids.shape[1], logits.argmax(-1, keepdim=True)
            if ids.item() in stops:
                break
            written.append(int(ids.item()))
        return written


def rows_of(cache: DynamicCache) -> dict[str, np.ndarray]:
    """Return [H, P, D] by the runtime's names."""
    rows = {}
    for index, layer in enumerate(cache.layers):
        rows[f"key.{index}"], rows[f"value.{index}"] = layer.keys[0], layer.values[0]
    return {name: tensor.clone().numpy() for name, tensor in rows.items()}


@torch.no_grad()
def plainly(
    plain: Plain, prompts: dict[str, str], question: str, *, form: str
) -> tuple[list[dict[str, np.ndarray]], str]:
    """Return the rows that come before each prompt that has some, and the answer."""
    *senders, answer = (plain.ids(prompt, question) for prompt in prompts.values())
    cache, start, handed = DynamicCache(), 0, []
    if form == "sequential":
        for ids in senders:
            start = plain.think(cache, ids, start=start)
            handed.append(rows_of(cache))
    else:
        for ids in senders:
            own = DynamicCache()
            start = plain.think(own, ids, start=start)
            for index, layer in enumerate(own.layers):
                cache.update(layer.keys, layer.values, index)
        handed.append(rows_of(cache))
    ids = plain.write(cache, answer, start=start)
    return handed, plain.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("form", "family"),
    [("sequential", "untied"), ("hierarchical", "untied"), ("sequential", "tied")],
)
def test_rows_and_text_are_those_of_the_published_rule(
    form: str, family: str, build_tiny: BuildTiny, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = spec_text(form, family)
    built = build_tiny(text)
    plain = Plain(folder / family)
    agents = parse_spec(text).document.agents
    prompts = {name: agent.prompt.then for name, agent in agents.items()}
    taken: list[list[np.ndarray]] = []
    take_rows = SequenceBatch.take_rows

    def noted(self: SequenceBatch, rows: Sequence[Sequence[Rows]]) -> None:
        take_rows(self, rows)
        (count,) = self.num_foreign
        taken.append(self.cache.read_rows([0], count))

    monkeypatch.setattr(SequenceBatch, "take_rows", noted)
    layers = built.system.manifest.backbones["smol"].layers
    names = [tensor.name for tensor in cache_tensors(layers)]
    texts = []
    for index, question in enumerate(QUESTIONS):
        taken.clear()
        record = rt.Record(id=str(index), fields={"question": question}, index=index)
        (answer,) = built.system.run_batch([record])
        assert isinstance(answer, rt.Answer), answer
        handed, expected = plainly(plain, prompts, question, form=form)
        assert len(taken) == len(handed)
        for ours, theirs in zip(taken, handed, strict=True):
            for name, rows in zip(names, ours, strict=True):
                assert rows[0].shape == theirs[name].shape
                error = np.abs(rows[0] - theirs[name]).max() / np.abs(theirs[name]).max()
                assert error < TOLERANCES["moved_rows_relative"], name
        assert answer.answer == expected
        texts.append(answer.answer)
    assert len(set(texts)) > 1, "texts that are all equal prove nothing"
    records = [{"id": str(i), "question": question} for i, question in enumerate(QUESTIONS)]
    assert built.reference(records).texts == texts
    batch = [rt.Record(id=str(i), fields=dict(r), index=i) for i, r in enumerate(records)]
    monkeypatch.undo()
    assert [answer.answer for answer in built.system.run_batch(batch)] == texts


@pytest.mark.parametrize("form", ["sequential", "hierarchical"])
def test_the_baseline_hands_every_turn_to_all_later_agents(
    form: str, build_tiny: BuildTiny, folder: Path
) -> None:
    """So it is the sequential system itself, and of experts the chain of the published code."""
    text = spec_text(form, "untied")
    system = build_tiny(text).system.baseline("latentmas")
    agents = parse_spec(text).document.agents
    prompts = {name: agent.prompt.then for name, agent in agents.items()}
    plain = Plain(folder / "untied")
    texts = [plainly(plain, prompts, question, form="sequential")[1] for question in QUESTIONS]
    records = [
        rt.Record(id=str(i), fields={"question": question}, index=i)
        for i, question in enumerate(QUESTIONS)
    ]
    assert [answer.answer for answer in system.run_batch(records)] == texts
    assert len(set(texts)) > 1, "texts that are all equal prove nothing"


def test_the_baseline_needs_the_rule_of_latentmas(build_tiny: BuildTiny) -> None:
    text = spec_text("sequential", "untied").replace("inner: {init: latentmas}", "inner: {}", 1)
    with pytest.raises(rt.RecmasError, match=r"RM508.*inner link of 'planner' is not") as caught:
        build_tiny(text).system.baseline("latentmas")
    assert "`inner: {init: latentmas}`" in caught.value.problems[0].hint
