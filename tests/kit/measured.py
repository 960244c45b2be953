"""How far a backbone's engines and its reference are from transformers, in one figure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kit.engines import Exported, make_engine, random_ids, relative
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_export.backbone_graph import CPU_DECODER, export_backbone

_LENGTHS, _STEPS, _CAPACITY = (30, 7), 3, 64

# How many positions of each row a call takes: whole prompts, and parts behind what is kept, of
# which one has none for the shorter row.
_PARTS = ((_LENGTHS,), ((12, 3), (5, 0), (13, 4)))


@torch.no_grad()
def largest_difference(backbone: TorchBackbone, folder: Path) -> float:
    """Export a backbone into `folder` and return the largest relative difference of a number.

    Compared are logits of the reference and of the head, and hidden states of a ragged batch, of
    prompts, parts of them and steps, over the portable decoder and that of the CPU, if any.
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
    for for_cpu in (False, True) if (folder / CPU_DECODER).exists() else (False,):
        found.extend(_differences(case, ids, expected, for_cpu=for_cpu))
    # of a list with a NaN `max` may return any other number
    return float(np.max(found))


def _differences(
    case: Exported, ids: list[torch.Tensor], expected: list[np.ndarray], *, for_cpu: bool
) -> list[float]:
    # zeros fill up the shorter row, as in a run: to a norm without an epsilon they are no numbers
    prompts = np.zeros((len(ids), max(_LENGTHS), case.width), np.float32)
    for row, length in enumerate(_LENGTHS):
        prompts[row, :length] = case.embed(ids[row][:, :length])[0]
    engine, inner = make_engine(case, for_cpu=for_cpu), case.no_link()
    found = []
    for parts in _PARTS:
        cache, at = engine.new_cache(len(ids), _CAPACITY), np.zeros(len(ids), np.int64)
        for part in parts:
            embeds = np.zeros((len(ids), max(part), case.width), np.float32)
            for row, (start, count) in enumerate(zip(at, part, strict=True)):
                embeds[row, :count] = prompts[row, start : start + count]
            hidden, _, _ = engine.forward(cache, embeds, at, np.array(part) - 1, inner)
            found.extend(
                relative(hidden[row, :count], expected[row][start : start + count])
                for row, (start, count) in enumerate(zip(at, part, strict=True))
                if count
            )
            at = at + part
        for _ in range(_STEPS):
            tokens = np.array([[int(i[0, p])] for i, p in zip(ids, at, strict=True)])
            hidden, _, _ = engine.forward(
                cache, engine.embed(tokens), at, np.zeros(len(ids), np.int64), inner
            )
            found.extend(relative(hidden[row, 0], expected[row][p]) for row, p in enumerate(at))
            at = at + 1
    return found
