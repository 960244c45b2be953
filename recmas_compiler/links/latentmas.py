"""The inner link of LatentMAS (arXiv:2511.20639): from head and input embeddings, without any text.

    W_a = (W_out^T W_out + lambda I)^-1 W_out^T W_in        thought -> embedding

What comes out is given the mean length of input embeddings. The equations are solved in float64.

Shape legend: V rows of the tables, D width.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.links.modules import LinkModule, randomize
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.link_kinds import LATENTMAS_KIND

# Of the published code.
LAMBDA: Final = 1e-5
# So far is the mean square of results before the norm above what the norm adds to it, for thoughts
# of numbers about 1: then that is less than float32 can tell.
_GAIN: Final = 1e3
_ROWS_AT_ONCE: Final = 4096


@torch.no_grad()
def realign(link: nn.Module, backbone: TorchBackbone, *, link_id: str) -> None:
    """Set an inner link's weights to the published rule; its branch is silent and can learn.

    Args:
        link: Of kind `rescaled`; changed in place.
        link_id: Seeds what stays random.

    Raises:
        RecmasError: RM121 for a backbone whose head is no table beside its input embeddings.
    """
    assert isinstance(link, LinkModule), "only links have a closed form"
    assert link.kind == LATENTMAS_KIND
    assert link.residual_proj is not None
    assert link.post_norm is not None
    weight_DD, length = realignment(backbone)
    width = len(weight_DD)
    randomize(link, link_id=link_id)
    nn.init.zeros_(link.proj2.weight)
    # The norm takes no notice of how long its input is.
    gain = _GAIN / weight_DD.square().sum(dim=0).mean().sqrt()
    link.residual_proj.weight.copy_(gain * weight_DD.T)
    link.post_norm.weight.fill_(length / width**0.5)


@torch.no_grad()
def realignment(backbone: TorchBackbone) -> tuple[Tensor, float]:
    """Return W_a [D, D] in float64, for thoughts as rows, and the mean length of embeddings.

    Input embeddings are those that the layers read: where a model scales its table, scaled.

    Raises:
        RecmasError: RM121 as `realign`.
    """
    head = backbone.model.get_output_embeddings()
    table_VD = backbone.model.get_input_embeddings().weight
    head_VD = None if head is None else head.weight
    if head_VD is None or head_VD.shape != table_VD.shape:
        raise fail(
            "RM121",
            f"`init: latentmas` cannot be used on backbone {backbone.facts.source!r}: its head is "
            "no table of as many rows and columns as its input embeddings have",
            hint="Use `init: aligned`.",
        )
    assert isinstance(table_VD, Tensor), "a table of weights"
    assert isinstance(head_VD, Tensor), "a table of weights"
    count, width = table_VD.shape
    gram_DD, products_DD = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    lengths = 0.0
    for first in range(0, count, _ROWS_AT_ONCE):
        ids = torch.arange(first, min(first + _ROWS_AT_ONCE, count), device=table_VD.device)
        in_ND = backbone.embed(ids).cpu().double()
        out_ND = head_VD[ids].cpu().double()
        gram_DD += out_ND.T @ out_ND
        products_DD += out_ND.T @ in_ND
        lengths += in_ND.norm(dim=1).sum().item()
    gram_DD += LAMBDA * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(gram_DD, products_DD), lengths / count
