"""The inner link of LatentMAS is the published rule, through every form that it is computed in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kit.models import LoadTiny
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.torch_engine import apply_inner
from recmas_compiler.links.latentmas import LAMBDA, realign
from recmas_compiler.links.modules import LinkModule, make_link, save_link
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.links import load_operands, stack_operands
from recmas_runtime.formats.manifest import LinkEntry


def made(backbone: TorchBackbone) -> LinkModule:
    link = make_link("rescaled", "inner", backbone.facts.width, backbone.facts.width)
    realign(link, backbone, link_id="a.inner")
    return link


def published(backbone: TorchBackbone, hidden_ND: Tensor) -> Tensor:
    """The rule as it is written down, with a matrix that is inverted, in float64."""
    head = backbone.model.get_output_embeddings().weight.double()
    table = backbone.embed(torch.arange(len(head))).double()
    identity = torch.eye(head.shape[1], dtype=torch.float64)
    matrix = torch.linalg.inv(head.T @ head + LAMBDA * identity) @ head.T @ table
    mapped = hidden_ND.double() @ matrix
    length = table.norm(dim=1).mean()
    return (mapped / mapped.norm(dim=1, keepdim=True) * length).float()


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gemma3", True)])
def test_it_is_the_published_rule(family: str, tied: bool, tiny: LoadTiny, tmp_path: Path) -> None:
    backbone = tiny(family, tie_word_embeddings=tied)
    link = made(backbone)
    # Thoughts of very different lengths: the result's is always the same.
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    hidden = hidden * torch.logspace(-1, 2, 40)[:, None]
    expected = published(backbone, hidden)
    is_identity = torch.nn.functional.cosine_similarity(expected, hidden, dim=1).min() > 0.999
    assert is_identity == tied, "the head is the table, so that there is nothing to realign"
    torch.testing.assert_close(link(hidden), expected, rtol=1e-5, atol=1e-6)
    path = tmp_path / "i.safetensors"
    save_link(path, link)
    entry = LinkEntry(
        file=path.name, kind="rescaled", role="inner", in_dim=64, out_dim=64, init="latentmas"
    )
    operands = stack_operands([load_operands(path, entry)])
    tensors = {name: torch.from_numpy(array) for name, array in operands.items()}
    unified = apply_inner(hidden[:, None], tensors)[:, 0]
    np.testing.assert_allclose(unified.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_it_can_learn(tiny: LoadTiny) -> None:
    link = made(tiny("llama"))
    link(torch.randn(4, 64)).sum().backward()
    assert link.proj2.weight.grad is not None
    assert link.proj2.weight.grad.abs().max() > 0


def test_a_head_that_is_no_table_is_refused(
    tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny("llama", tie_word_embeddings=False)
    monkeypatch.setattr(backbone.model, "lm_head", torch.nn.Linear(64, 3, bias=False))
    with pytest.raises(RecmasError, match=r"RM121.*`init: latentmas` cannot be used"):
        made(backbone)
