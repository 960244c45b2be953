"""Rounding to few bits: a quantizer stores it exactly, and it does less harm than the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    DefaultWeightOnlyQuantizer,
)
from torch import Tensor, nn

from kit.engines import CASES
from kit.models import load_tiny
from recmas_compiler.backbones.torch_model import TorchBackbone, weights_digest
from recmas_compiler.links.calibration import sample_answers
from recmas_export import rounding as compensated_rounding
from recmas_export.rounding import compensated, rounded_layers
from recmas_runtime.core.progress import Silent
from recmas_runtime.formats.precisions import PRECISIONS

BLOCK_SIZE = PRECISIONS["int4"].layer_block_size or 0
NUM_INPUTS, NUM_OUTPUTS = 2 * BLOCK_SIZE + BLOCK_SIZE // 2, 24  # the last block is half full


def stored(weight_NK: Tensor) -> Tensor:
    """Return what ONNX Runtime's quantizer makes of a weight."""
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=4)
    matrix = np.ascontiguousarray(weight_NK.numpy().T)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    integers = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.float32) - 8
    num_outputs, num_blocks = packed.shape[:2]
    blocks = integers.reshape(num_outputs, num_blocks, BLOCK_SIZE) * scales.reshape(
        num_outputs, num_blocks, 1
    )
    return torch.from_numpy(blocks.reshape(num_outputs, -1)[:, : weight_NK.shape[1]])


@pytest.fixture
def weight_NK() -> Tensor:
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0
    weight[1, :BLOCK_SIZE] = 0.0
    return weight


def inputs_TK() -> Tensor:
    """Inputs that vary in a few directions most, as those of language models do."""
    draw = torch.Generator().manual_seed(1)
    few = torch.randn(400, 12, generator=draw) @ torch.randn(12, NUM_INPUTS, generator=draw)
    return few + 0.1 * torch.randn(400, NUM_INPUTS, generator=draw)


def test_a_quantizer_stores_it_exactly(weight_NK: Tensor) -> None:
    x_TK = inputs_TK()
    rounded = compensated(weight_NK, (x_TK.T @ x_TK).double(), bits=4, block_size=BLOCK_SIZE)
    torch.testing.assert_close(stored(rounded), rounded, rtol=1e-6, atol=0.0)
    assert not torch.allclose(rounded, weight_NK, atol=1e-2)
    assert torch.equal(rounded[0], torch.zeros(NUM_INPUTS))


def test_outputs_change_less_than_by_the_nearest(weight_NK: Tensor) -> None:
    x_TK = inputs_TK()
    rounded = compensated(weight_NK, (x_TK.T @ x_TK).double(), bits=4, block_size=BLOCK_SIZE)
    expected = x_TK @ weight_NK.T
    error = (x_TK @ rounded.T - expected).square().sum()
    nearest = (x_TK @ stored(weight_NK).T - expected).square().sum()
    assert error < 0.2 * nearest


def test_inputs_that_never_vary_do_no_harm(weight_NK: Tensor) -> None:
    rounded = compensated(
        weight_NK, torch.zeros(NUM_INPUTS, NUM_INPUTS).double(), bits=4, block_size=BLOCK_SIZE
    )
    assert (rounded - weight_NK).abs().max() < weight_NK.abs().max() / 8


def linears(backbone: TorchBackbone) -> list[nn.Linear]:
    return [module for module in backbone.body.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-all-slide"])
def test_every_layer_is_rounded_and_given_back(tmp_path: Path, name: str) -> None:
    family, dims = CASES[name]
    backbone = load_tiny(tmp_path / name, family, **dims)
    before, exact = weights_digest(backbone.model), [m.weight.data for m in linears(backbone)]
    with rounded_layers(backbone, precision="int4", progress=Silent()):
        held = [module.weight.data for module in linears(backbone)]
        for weight, rounded in zip(exact, held, strict=True):
            torch.testing.assert_close(stored(rounded), rounded, rtol=1e-6, atol=0.0)
            assert not torch.equal(weight, rounded)
    assert weights_digest(backbone.model) == before


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_with_bits_enough_nothing_is_rounded(tmp_path: Path, precision: str) -> None:
    backbone = load_tiny(tmp_path / "llama", "llama", num_hidden_layers=2)
    before = weights_digest(backbone.model)
    with rounded_layers(backbone, precision=precision, progress=Silent()):
        assert weights_digest(backbone.model) == before


def are_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-5 * a.abs().max())


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi3-all-slide"])
def test_layers_see_the_inputs_that_the_model_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Layers run one by one, so each must be called as the model calls it: mask and angles."""
    family, dims = CASES[name]
    backbone = load_tiny(tmp_path / name, family, **dims)
    seen: list[Tensor] = []

    def look(weight_NK: Tensor, products_KK: Tensor, *, bits: int, block_size: int) -> Tensor:
        seen.append(products_KK)
        return weight_NK

    monkeypatch.setattr(compensated_rounding, "compensated", look)
    with rounded_layers(backbone, precision="int4", progress=Silent()):
        pass

    expected: dict[nn.Module, Any] = dict.fromkeys(linears(backbone), 0.0)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TK = args[0].flatten(0, -2)
        expected[module] = expected[module] + (x_TK.T @ x_TK).double()

    answers = sample_answers(backbone)
    for module in expected:
        module.register_forward_pre_hook(add)
    with torch.no_grad():
        for ids_T in answers:
            backbone.body(inputs_embeds=backbone.embed(ids_T[None]), use_cache=False)
    # Matrices with the same input are one call, so each found sum stands for one or several.
    sums = list(expected.values())
    assert all(any(are_equal(s, found) for s in sums) for found in seen)
    assert all(any(are_equal(s, found) for s in seen) for found in sums)
