"""What every torch form of a backbone shares: the door from numpy, tables, inner links.

Shape legend: R rows (agents of a batch times samples), S positions of a call, d model width, V
vocabulary, G groups of rows with one link each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_runtime.formats.link_kinds import LAYER_NORM_EPSILON

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Operands = Mapping[str, NDArray[Any]]
Inner = Mapping[str, Tensor]


class TorchTables:
    """A backbone in torch, without the way it runs its layers.

    Args:
        backbone: Its model moves to `device` and `dtype`.
        device: `cpu` or `cuda`.
        dtype: Element type of weights and activations.
    """

    def __init__(
        self, backbone: TorchBackbone, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.entry = backbone.facts
        self.device = torch.device(device)
        self.dtype = dtype
        self._backbone = backbone
        self._bound: tuple[Operands, Inner] = ({}, {})
        backbone.model.to(device=self.device, dtype=dtype)

    @torch.no_grad()
    def embed(self, input_ids: Indices) -> Floats:
        """Return the input embeddings [R, S, d] of token ids [R, S]."""
        return to_numpy(self._backbone.embed(torch.from_numpy(input_ids).to(self.device)))

    @torch.no_grad()
    def logits(self, hidden: Floats) -> Floats:
        """Return the logits [R, V] of final hidden states [R, d]."""
        return to_numpy(self._backbone.logits(self.tensor(hidden)))

    def tensor(self, array: Floats) -> Tensor:
        """Return an array on the device, in the engine's element type."""
        return torch.from_numpy(array).to(device=self.device, dtype=self.dtype)

    def bind(self, operands: Operands) -> Inner:
        """Return inner links on the device, the same tensors while the links stay the same."""
        if self._bound[0] is not operands:
            tensors = {
                name: torch.from_numpy(array).to(
                    device=self.device,
                    dtype=torch.bool if array.dtype == np.bool_ else self.dtype,
                )
                for name, array in operands.items()
            }
            self._bound = operands, tensors
        return self._bound[1]


def apply_inner(hidden_R1d: Tensor, links: Inner) -> Tensor:
    """Return the inner links' outputs [R, 1, d], in the runtime's unified form of a link.

    Args:
        hidden_R1d: Rows of G groups, group by group.
        links: Operands with a leading axis G, as `recmas_runtime.formats.links` describes them.
    """
    width = hidden_R1d.shape[-1]
    x = hidden_R1d.reshape(links["w1"].shape[0], -1, width)
    normed = torch.where(links["pre_norm"], _norm(x, "pre", links), x)
    y = torch.bmm(gelu(torch.bmm(normed, links["w1"]) + links["b1"]), links["w2"])
    y = y + torch.bmm(x, links["w3"]) + links["bias"]
    y = torch.where(links["post_norm"], _norm(y, "post", links), y)
    return y.reshape(hidden_R1d.shape)


def _norm(x: Tensor, name: str, links: Inner) -> Tensor:
    normed = layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPSILON)
    return normed * links[f"{name}_scale"] + links[f"{name}_bias"]


def to_numpy(tensor: Tensor) -> Floats:
    """Return a tensor on the host in float32."""
    array: Floats = tensor.to("cpu", torch.float32).numpy()
    return array
