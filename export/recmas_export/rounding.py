"""Rounding of weights to few bits in which later weights make good for the errors of earlier ones.

The nearest number is best for a weight alone. But a product adds up many of them over inputs that
vary together, so that an error can be cancelled by the weights that are still to be rounded: the
method of GPTQ (Frantar et al., arXiv 2210.17323), in the order of how loud inputs are, with scales
that are chosen before. What inputs look like is seen in answers that the backbone makes up itself.

The rounded weights are exactly those that a block-wise quantizer without zero points stores: the
largest of each block is the most negative integer times the block's scale.

Shape legend: B sequences, T positions of a sequence, K inputs and N outputs of a product, b inputs
of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.calibration import sample_answers, sample_prompts
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.precisions import PRECISIONS

# With 8 bits the nearest number is good enough.
_FEW_BITS: Final = 4

# Scales to choose from, in shares of the one that clips nothing.
_SHRINKS: Final = tuple(1 - step / 25 for step in range(12))

# Inputs after which an error reaches all the others, in one product.
_AT_A_TIME: Final = 64

# Added to the diagonal of the inputs' products, as a share of its mean: inputs that hardly vary
# would let errors grow without bound.
_DAMPING: Final = 0.01


@contextmanager
def rounded_layers(
    backbone: TorchBackbone, *, precision: str, progress: Progress
) -> Iterator[None]:
    """Hold the weights of a backbone's layers at what few bits can hold; leaving restores them.

    A quantizer with the precision's blocks and no zero points stores the held weights exactly. A
    precision whose layers have more than 4 bits changes nothing.
    """
    row = PRECISIONS[precision]
    bits, block_size = row.layer_bits, row.layer_block_size or row.block_size
    if block_size is None or bits > _FEW_BITS:
        yield
        return
    # The decoder's layers, in order.
    lists = (module for module in backbone.body.modules() if isinstance(module, nn.ModuleList))
    layers = list(next(found for found in lists if len(found) == backbone.facts.num_layers))
    exact = {linear: linear.weight.data for layer in layers for linear in _linears(layer)}
    try:
        _round_layers(backbone, layers, bits=bits, block_size=block_size, progress=progress)
        yield
    finally:
        for linear, weight in exact.items():
            linear.weight.data = weight


@torch.no_grad()
def input_peaks(backbone: TorchBackbone) -> dict[str, NDArray[np.float32]]:
    """Return, by the name of each linear module, the peak of each channel of its input [K].

    That is the largest share that it has of the largest magnitude of any row, over the prompts of
    everyday requests. Names are those of a traced decoder, `body.` and the module's own.
    """
    peaks: dict[str, Tensor] = {}

    def record(name: str, args: tuple[Any, ...]) -> None:
        rows_TK = args[0].detach().flatten(0, -2).abs().float()
        shares_TK = rows_TK / rows_TK.amax(1, keepdim=True).clamp(min=torch.finfo().tiny)
        found_K = shares_TK.amax(0)
        peaks[name] = torch.maximum(peaks[name], found_K) if name in peaks else found_K

    hooks = [
        module.register_forward_pre_hook(lambda _, args, n=f"body.{name}": record(n, args))
        for name, module in backbone.body.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for ids_T in sample_prompts(backbone):
            backbone.body(inputs_embeds=backbone.embed(ids_T[None]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found_K.cpu().numpy() for name, found_K in peaks.items()}


def compensated(weight_NK: Tensor, products_KK: Tensor, *, bits: int, block_size: int) -> Tensor:
    """Return a float32 weight rounded so that its outputs change little.

    The products are float64 sums x^T x of its inputs over all positions. Scales are chosen first.
    Then weights are rounded one after the other, those of the loudest inputs first: the more are
    still to come, the better an error is made good for.
    """
    loudness_K = products_KK.diagonal().float()
    scale_NK, is_largest_NK = _scales(weight_NK, loudness_K, bits=bits, block_size=block_size)
    order_K = loudness_K.argsort(descending=True, stable=True)
    factor_KK = _factor(products_KK[order_K][:, order_K]).float()
    # Inputs are rows here, so that the weights of one lie beside each other in memory.
    rest_KN, scale_KN, is_largest_KN = (
        each.T[order_K] for each in (weight_NK, scale_NK, is_largest_NK)
    )
    # A quantizer finds the scale by these weights, so they stay their blocks' largest.
    largest_KN = -(2 ** (bits - 1)) * scale_KN
    held_KN = torch.empty_like(rest_KN)
    for start in range(0, len(rest_KN), _AT_A_TIME):
        end = min(start + _AT_A_TIME, len(rest_KN))
        part_bN, factor_bb = rest_KN[start:end].clone(), factor_KK[start:end, start:end]
        errors_bN = torch.empty_like(part_bN)
        for i, k in enumerate(range(start, end)):
            held_N = _nearest(part_bN[i], scale_KN[k], bits)
            held_KN[k] = torch.where(is_largest_KN[k], largest_KN[k], held_N)
            errors_bN[i] = (part_bN[i] - held_KN[k]) / factor_bb[i, i]
            part_bN[i + 1 :].addr_(factor_bb[i, i + 1 :], errors_bN[i], alpha=-1)
        rest_KN[end:] -= factor_KK[start:end, end:].T @ errors_bN
    rounded_KN = torch.empty_like(held_KN)
    rounded_KN[order_K] = held_KN
    return rounded_KN.T.contiguous()


def _nearest(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest integers in range, times the scale."""
    half = 2 ** (bits - 1)
    return (weights / scale).round().clamp(-half, half - 1) * scale


def _scales(
    weight_NK: Tensor, loudness_K: Tensor, *, bits: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Return the best scale of each weight's block, and whether it is the block's largest [N, K].

    The scale has the sign that makes the largest weight the most negative integer. A block of
    zeros has a scale of 1 and no largest weight. Errors count by how loud their inputs are.
    """
    num_outputs, num_inputs = weight_NK.shape
    filling = -num_inputs % block_size
    blocks_Nnb = nn.functional.pad(weight_NK, (0, filling)).view(num_outputs, -1, block_size)
    loudness_nb = nn.functional.pad(loudness_K, (0, filling)).view(-1, block_size)
    largest_Nn1 = blocks_Nnb.abs().argmax(-1, keepdim=True)
    widest_Nn1 = blocks_Nnb.gather(-1, largest_Nn1) / -(2 ** (bits - 1))
    is_zero_Nn1 = widest_Nn1 == 0
    widest_Nn1 = widest_Nn1.masked_fill(is_zero_Nn1, 1.0)
    scale_Nn1, least_Nn1 = widest_Nn1, torch.full_like(widest_Nn1, torch.inf)
    for shrink in _SHRINKS:
        tried_Nn1 = widest_Nn1 * shrink
        errors_Nnb = (_nearest(blocks_Nnb, tried_Nn1, bits) - blocks_Nnb).square()
        error_Nn1 = (errors_Nnb * loudness_nb).sum(-1, keepdim=True)
        scale_Nn1 = torch.where(error_Nn1 < least_Nn1, tried_Nn1, scale_Nn1)
        least_Nn1 = torch.minimum(error_Nn1, least_Nn1)
    scale_Nn1 = scale_Nn1.masked_fill(is_zero_Nn1, 1.0)
    is_largest_Nnb = torch.arange(block_size) == largest_Nn1.masked_fill(is_zero_Nn1, -1)
    whole = (scale_Nn1.expand_as(blocks_Nnb), is_largest_Nnb)
    scale_NK, is_largest_NK = (each.reshape(num_outputs, -1)[:, :num_inputs] for each in whole)
    return scale_NK, is_largest_NK


def _factor(products_KK: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U the inverse of the damped products."""
    diagonal_K = products_KK.diagonal()
    damping = _DAMPING * diagonal_K.mean() if bool(diagonal_K.any()) else torch.tensor(1.0)
    damped_KK = products_KK + torch.eye(len(products_KK), dtype=products_KK.dtype) * damping
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    factor_KK: Tensor = torch.linalg.cholesky(inverse_KK, upper=True)
    return factor_KK


@dataclass
class _Run:
    """A sequence [1, T, d] before the next layer, and what else each layer is called with."""

    hidden: Tensor
    arguments: list[Mapping[str, Any]]


@torch.no_grad()
def _round_layers(
    backbone: TorchBackbone,
    layers: Sequence[nn.Module],
    *,
    bits: int,
    block_size: int,
    progress: Progress,
) -> None:
    """Round one layer after the other, each for the inputs that the rounded ones before it give."""
    with progress.stage("Rounding weights", len(layers)) as advance:
        runs = [_enter(backbone, layers, ids_T) for ids_T in sample_answers(backbone)]
        for index, layer in enumerate(layers):
            for linears, products_KK in _products(layer, runs, index).items():
                weights_NK = torch.cat([linear.weight.data for linear in linears])
                rounded_NK = compensated(weights_NK, products_KK, bits=bits, block_size=block_size)
                parts = torch.split(rounded_NK, [linear.out_features for linear in linears])
                for linear, part in zip(linears, parts, strict=True):
                    linear.weight.data = part.clone()
            for run in runs:
                run.hidden = _call(layer, run, index)
            advance()


def _enter(backbone: TorchBackbone, layers: Sequence[nn.Module], ids_T: Tensor) -> _Run:
    """Return a sequence before its first layer, with what the model calls every layer with."""
    inputs: list[Tensor] = []
    arguments: list[Mapping[str, Any]] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.append(kwargs)

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        backbone.body(inputs_embeds=backbone.embed(ids_T[None]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(hidden=inputs[0], arguments=arguments)


def _products(
    layer: nn.Module, runs: Sequence[_Run], index: int
) -> dict[tuple[nn.Linear, ...], Tensor]:
    """Return the products of the inputs of a layer's matrices, those with the same input as one."""
    calls: list[tuple[nn.Linear, Tensor]] = []

    def record(linear: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(linear, nn.Linear)
        calls.append((linear, args[0]))

    hooks = [linear.register_forward_pre_hook(record) for linear in _linears(layer)]
    sums: dict[tuple[nn.Linear, ...], Tensor] = {}
    try:
        for run in runs:
            calls.clear()
            _call(layer, run, index)
            by_input: dict[int, list[nn.Linear]] = {}
            for linear, inputs in calls:
                by_input.setdefault(id(inputs), []).append(linear)
            inputs_of = dict(calls)
            for linears in map(tuple, by_input.values()):
                x_TK = inputs_of[linears[0]].flatten(0, -2)
                products_KK = (x_TK.T @ x_TK).double()
                sums[linears] = sums[linears] + products_KK if linears in sums else products_KK
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _call(layer: nn.Module, run: _Run, index: int) -> Tensor:
    output = layer(run.hidden, **run.arguments[index])
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _linears(layer: nn.Module) -> list[nn.Linear]:
    """Return what is rounded here: not the matrix that chooses experts, which stays exact."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    stacked = {weight.shape[0] for weight in layer.parameters() if weight.ndim == 3}
    return [linear for linear in linears if linear.out_features not in stacked]
