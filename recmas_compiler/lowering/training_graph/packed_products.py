"""Products of a frozen backbone with weights in the layout of oneDNN's kernels, both ways.

torch multiplies float32 matrices on a CPU with MKL, which on an AMD EPYC reaches half of what
oneDNN does, and lays bfloat16 weights out anew at every call, which takes longer than a latent step
of a few rows. A frozen weight needs that once: as it is for outputs, transposed for gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone

_DTYPES: Final = (torch.float32, torch.bfloat16)
# Another order of sums, in layers of random weights too; what is wrong is off by far more.
_RELATIVE: Final = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
_NUM_POSITIONS: Final = 3


class _Product(torch.autograd.Function):
    """x W^T + b, with gradients for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
        ctx.turned = turned
        return multiply_packed(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return multiply_packed(gradients[0], ctx.turned, None), None, None, None


def packed_weight(weight: Tensor) -> Tensor:
    """Return a weight [out, in] in the layout of oneDNN's kernels, for any number of rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply [..., in] with a packed weight; returns [..., out]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y


def pack_products(backbone: TorchBackbone) -> bool:
    """Pack the weights of all linear layers of a backbone's body, and let go of the others.

    Where a model reads such a weight by itself, nothing is changed.

    Returns:
        Whether they are packed: on a CPU, in float32 or bfloat16, where torch has oneDNN.
    """
    layers = [
        module
        for module in backbone.body.modules()
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype in _DTYPES
        and not module.weight.requires_grad
        and module.weight is not backbone.embedding.weight
    ]
    if not layers or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    before = _trial(backbone)
    weights = [layer.weight for layer in layers]
    for layer in layers:
        _pack(layer)
    try:
        after = _trial(backbone)
        limit = _RELATIVE[weights[0].dtype] * float(before.abs().max())
        if float((after - before).abs().max()) <= limit:
            return True
    except (RuntimeError, IndexError):
        pass  # a layer's weight was read: what is left of it has no entries
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight = weight
        del vars(layer)["forward"]
    return False


def _pack(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    packed = packed_weight(weight)
    turned = packed_weight(weight.t().contiguous())
    bias = None if layer.bias is None else layer.bias.detach()
    layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    vars(layer)["forward"] = partial(_run, packed=packed, turned=turned, bias=bias)


def _run(x: Tensor, *, packed: Tensor, turned: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = _Product.apply(x, packed, turned, bias)  # type: ignore[no-untyped-call]
    return y


@torch.no_grad()
def _trial(backbone: TorchBackbone) -> Tensor:
    """Return the hidden states of a few tokens."""
    ids = torch.arange(_NUM_POSITIONS)[None] % backbone.facts.vocab_size
    found: Tensor = backbone.body(
        inputs_embeds=backbone.embed(ids), use_cache=False
    ).last_hidden_state
    return found.float()
