"""How far a backbone's engines and its reference are from transformers, in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kit.engines import Exported, identity_link, make_engine, random_ids, relative
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export.backbone_graph import CPU_DECODER, export_backbone
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.links import stack_operands

_LENGTHS, _STEPS, _CAPACITY = (30, 7), 3, 64
# How many positions of each row a call takes: whole prompts, and parts behind what is kept, of
# which one has none for the shorter row.
_PARTS = ((_LENGTHS,), ((12, 3), (5, 0), (13, 4)))


@torch.no_grad()
def largest_difference(backbone: TorchBackbone, folder: Path) -> float:
    """Export a backbone into `folder` and return the largest relative difference of a number.

    Compared are logits of the reference and of the head, and hidden states of a ragged batch, of
    prompts, parts of them and steps, over the portable decoder and that of the CPU where there is
    one.
    """
    export_backbone(backbone, folder)
    case = Exported(backbone, folder, was_changed=False)
    ids = [random_ids(backbone, 1, length + _STEPS, seed=length) for length in _LENGTHS]
    expected = [case.reference(row)[0] for row in ids]
    found = []
    for row, hidden in zip(ids, expected, strict=True):
        wanted = backbone.model(input_ids=row).logits[0].numpy()
        (from_engine,) = case.head.run(None, {"hidden": hidden})
        found.append(relative(from_engine, wanted))
        found.append(relative(backbone.logits(torch.from_numpy(hidden)).numpy(), wanted))
    # zeros fill up the shorter row, as in a run: to a norm without an epsilon they are no numbers
    prompts = np.zeros((len(_LENGTHS), max(_LENGTHS), case.width), np.float32)
    for row, length in enumerate(_LENGTHS):
        prompts[row, :length] = case.embed(ids[row][:, :length])[0]
    for for_cpu in (False, True) if (folder / CPU_DECODER).exists() else (False,):
        engine = make_engine(case, for_cpu=for_cpu)
        for parts in _PARTS:
            found += _differences(engine, prompts, expected, ids, parts)
    # of a list with a NaN `max` may return any other number
    return float(np.max(found))


def _differences(
    engine: BackboneEngine,
    prompts: NDArray[np.float32],
    expected: list[NDArray[np.float32]],
    ids: list[torch.Tensor],
    parts: Sequence[tuple[int, ...]],
) -> list[float]:
    """Run prompts in parts, and steps behind them; returns how far each is off."""
    inner, at = stack_operands([identity_link(prompts.shape[2])]), np.zeros(len(ids), np.int64)
    cache = engine.new_cache(len(ids), _CAPACITY)
    found = []
    for part in parts:
        embeds = np.zeros((len(ids), max(part), prompts.shape[2]), np.float32)
        for row, (start, count) in enumerate(zip(at, part, strict=True)):
            embeds[row, :count] = prompts[row, start : start + count]
        hidden, _, _ = engine.forward(cache, embeds, at, np.array(part) - 1, inner)
        found += [
            relative(hidden[row, :count], expected[row][start : start + count])
            for row, (start, count) in enumerate(zip(at, part, strict=True))
            if count
        ]
        at = at + part
    for _ in range(_STEPS):
        tokens = np.array([[int(i[0, p])] for i, p in zip(ids, at, strict=True)])
        hidden, _, _ = engine.forward(
            cache, engine.embed(tokens), at, np.zeros(len(ids), np.int64), inner
        )
        found += [relative(hidden[row, 0], expected[row][p]) for row, p in enumerate(at)]
        at = at + 1
    return found
