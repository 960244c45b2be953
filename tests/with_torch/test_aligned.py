"""Closed-form starts: better than knowing nothing, exact where they can be, always the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from kit.graphs import topology
from kit.models import LoadTiny
from kit.systems import RECORDS, declare
from recmas_compiler.links.aligned import align_inner, align_outer, ridge
from recmas_compiler.links.calibration import REQUESTS, Calibration, calibrate
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.links.modules import make_link, save_link
from recmas_compiler.lowering.materialize import materialize_links
from recmas_compiler.lowering.reference import load_backbones, to_torch
from recmas_compiler.passes.pipeline import run_pipeline
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.progress import Advance, Silent
from recmas_runtime.formats.link_kinds import LinkKind

KINDS = get_args(LinkKind)


@pytest.fixture(scope="module")
def calibration(tiny: LoadTiny) -> Calibration:
    return calibrate(tiny("llama"), progress=Silent())


def test_calibration_pairs_thoughts_with_what_follows(
    tiny: LoadTiny, calibration: Calibration
) -> None:
    backbone = tiny("llama")
    # mean embeddings really are those of the thoughts' own distributions
    table = backbone.embed(torch.arange(backbone.facts.vocab_size))
    odds = backbone.logits(calibration.hidden_ND[:50]).softmax(-1)
    torch.testing.assert_close(calibration.expected_ND[:50], odds @ table)
    assert 0.1 < calibration.is_held_out_N.float().mean() < 0.15
    assert len(torch.unique(calibration.hidden_ND, dim=0)) == len(calibration.hidden_ND)


def test_calibration_is_the_same_every_time(tiny: LoadTiny, calibration: Calibration) -> None:
    torch.manual_seed(99)
    again = calibrate(tiny("llama"), progress=Silent())
    assert torch.equal(again.hidden_ND, calibration.hidden_ND)
    assert torch.equal(again.next_ND, calibration.next_ND)
    other = calibrate(tiny("llama"), progress=Silent(), seed=1)
    assert not torch.equal(other.next_ND, calibration.next_ND)


def test_ragged_openings_do_not_disturb_each_other(tiny: LoadTiny) -> None:
    """The first thought of every sequence is the one it has on its own."""
    backbone = tiny("gemma3")
    found = calibrate(backbone, progress=Silent()).hidden_ND[: len(REQUESTS)]
    for i in (0, 1, 20):
        text = backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": REQUESTS[i]}], tokenize=False, add_generation_prompt=True
        )
        ids = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        alone = backbone.body(inputs_embeds=backbone.embed(ids)).last_hidden_state[0, -1]
        torch.testing.assert_close(found[i], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_beats_a_constant(calibration: Calibration, kind: str) -> None:
    link = make_link(kind, "inner", 64, 64)
    found = align_inner(link, calibration, link_id="a.inner")
    held_out = calibration.is_held_out_N
    constant = calibration.expected_ND[~held_out].mean(0)
    answers = link(calibration.hidden_ND[held_out])
    truth = calibration.next_ND[held_out]
    cosine = torch.nn.functional.cosine_similarity(answers, truth, dim=-1).mean()
    assert cosine.item() == pytest.approx(found.cosine, abs=1e-6)
    assert found.num_held_out == len(truth)
    assert found.cosine > mean_cosine(constant, truth) + 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_aligned_link_can_still_learn(calibration: Calibration, kind: str) -> None:
    link = make_link(kind, "inner", 64, 64)
    align_inner(link, calibration, link_id="a.inner")
    loss = (link(calibration.hidden_ND[:64]) - calibration.next_ND[:64]).square().mean()
    loss.backward()
    assert link.proj2.weight.grad.abs().max() > 0
    assert link.proj1.weight.abs().max() > 0


def test_starts_of_different_links_differ_only_where_they_are_random(
    calibration: Calibration,
) -> None:
    links = [make_link("projected", "inner", 64, 64) for _ in range(3)]
    for link, link_id in zip(links, ("a.inner", "a.inner", "b.inner"), strict=True):
        align_inner(link, calibration, link_id=link_id)
    first, again, other = (link.state_dict() for link in links)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(first["residual_proj.weight"], other["residual_proj.weight"])
    assert not torch.equal(first["proj1.weight"], other["proj1.weight"])
    assert not first["proj2.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_outer_on_one_backbone_is_the_identity(tiny: LoadTiny, family: str, kind: str) -> None:
    backbone = tiny(family)
    link = make_link(kind, "outer", 64, 64)
    found = align_outer(link, backbone, backbone, link_id="a->b")
    x = backbone.embed(torch.arange(100))
    if kind in ("ln_residual", "rescaled"):  # its final norm forgets each embedding's length
        assert found.cosine > 0.98
    else:
        torch.testing.assert_close(link(x), x, rtol=0, atol=0)
        assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_outer_between_backbones_beats_a_constant(tiny: LoadTiny, kind: str) -> None:
    """Embeddings drawn apart have nothing in common, so the target is made from the source."""
    source, target = tiny("llama"), tiny("qwen2", hidden_size=48)
    ids = {target.tokenizer.decode([i]): i for i in range(target.facts.vocab_size)}
    turn = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) / 8
    table = target.embedding.weight.clone()
    for i in range(source.facts.vocab_size):
        text = source.tokenizer.decode([i])
        if text in ids:
            table[ids[text]] = source.embed(torch.tensor(i)) @ turn
    with torch.no_grad():
        kept = target.embedding.weight.clone()
        target.embedding.weight.copy_(table)
        link = make_link(kind, "outer", 64, 48)
        found = align_outer(link, source, target, link_id="a->b")
        target.embedding.weight.copy_(kept)
    assert found.cosine > 0.9
    aimed_at = table[list(ids.values())]
    assert found.cosine > mean_cosine(aimed_at.mean(0), aimed_at) + 0.5


def mean_cosine(constant: Tensor, truth: Tensor) -> float:
    """Return what an answer that is always the same gets."""
    return torch.nn.functional.cosine_similarity(constant[None], truth, dim=-1).mean().item()


def test_ridge_finds_an_affine_map() -> None:
    x = torch.randn(500, 5)
    weight, bias = torch.randn(3, 5), torch.randn(3)
    found, offset = ridge(x, x @ weight.T + bias, 1e-9)
    torch.testing.assert_close(found.float(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offset.float(), bias, rtol=1e-4, atol=1e-4)
    through_origin, nothing = ridge(x, x @ weight.T, 1e-9, has_bias=False)
    torch.testing.assert_close(through_origin.float(), weight, rtol=1e-4, atol=1e-4)
    assert not nothing.any()


def test_ridge_survives_an_input_that_never_changes() -> None:
    x = torch.cat([torch.randn(100, 3), torch.ones(100, 1)], dim=1)
    weight, bias = ridge(x, x[:, :1], 0.1)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()


def test_vocabularies_without_common_tokens_are_refused(
    tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recmas_compiler.links.aligned.MIN_SHARED_TOKENS", 10_000)
    with pytest.raises(RecmasError, match=r"error\[RM121\]: link 'a->b' cannot be aligned"):
        align_outer(
            make_link("projected", "outer", 64, 64), tiny("llama"), tiny("phi3"), link_id="a->b"
        )


class Watcher:
    """Counts stages by title."""

    def __init__(self) -> None:
        self.stages: Counter[str] = Counter()

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, done: int = 0) -> Iterator[Advance]:
        self.stages[title] += 1
        yield lambda num_units=1, *, note="": None


def test_links_come_from_files_closed_forms_and_chance(tiny: LoadTiny, tmp_path: Path) -> None:
    backbone = tiny("llama")
    graph = topology("a b", "a>b b~>a", rounds=2, steps=3, backbones=[declare("tiny", backbone)])
    stored = make_link("residual", "outer", 64, 64)
    save_link(tmp_path / "b-a.safetensors", stored)
    weights = LinkWeights(
        kind="residual",
        init="aligned",
        file=str(tmp_path / "b-a.safetensors"),
        in_dim=64,
        out_dim=64,
    )
    links = dict(graph.system.links)
    links["b->a"] = replace(links["b->a"], weights=weights)
    links["a->b"] = replace(links["a->b"], weights=replace(links["a->b"].weights, init="random"))
    graph = graph.replaced(system=replace(graph.system, links=links))
    watcher = Watcher()
    made = materialize_links(graph, {"tiny": backbone}, progress=watcher)
    assert list(made) == ["a.inner", "b.inner", "a->b", "b->a"]
    assert [link.init for link in made.values()] == ["aligned", "aligned", "random", "file"]
    assert sum(watcher.stages.values()) == 1, "agents that share a backbone share its calibration"
    assert torch.equal(made["b->a"].module.proj1.weight, stored.proj1.weight)
    assert made["a.inner"].cosine == made["b.inner"].cosine > 0.1
    assert made["a->b"].cosine is None


def test_to_torch_loads_and_makes_what_is_not_given(tiny: LoadTiny) -> None:
    backbone = tiny("qwen3")
    graph = topology("a b", "a>b", rounds=1, steps=3, backbones=[declare("tiny", backbone)])
    program = run_pipeline(graph)
    watcher = Watcher()
    system = to_torch(program, progress=watcher)
    assert len(watcher.stages) == 2
    made = materialize_links(program, {"tiny": backbone}, progress=Silent())
    given = to_torch(
        program,
        backbones={"tiny": backbone},
        links={name: link.module for name, link in made.items()},
    )
    assert system.run(RECORDS).token_ids == given.run(RECORDS).token_ids
    assert load_backbones(program, progress=Silent()).keys() == {"tiny"}
