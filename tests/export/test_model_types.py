"""Model types beyond the families of the other tests: engines, the reference and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kit.engines import Exported, make_engine, random_ids, relative
from kit.models import load_folder
from kit.zoo import ZOO, write_zoo_model
from recmas_export.backbone_graph import CPU_DECODER, export_backbone
from recmas_runtime.formats.precisions import TOLERANCES

TIGHT = TOLERANCES["hidden_relative"] / 10


@pytest.mark.parametrize("name", ZOO)
def test_engine_reference_and_transformers_agree(name: str, tmp_path: Path) -> None:
    """In a ragged batch, past any window, prompt and steps, over both decoders."""
    backbone = load_folder(write_zoo_model(tmp_path / "model", name))
    export_backbone(backbone, tmp_path / "graphs")
    case = Exported(backbone, tmp_path / "graphs", was_changed=False)
    lengths, steps = (30, 7), 3
    ids = [random_ids(backbone, 1, length + steps, seed=length) for length in lengths]
    with torch.no_grad():
        expected = [case.reference(row)[0] for row in ids]
        logits = [backbone.model(input_ids=row).logits[0].numpy() for row in ids]
        for hidden, wanted in zip(expected, logits, strict=True):
            assert relative(backbone.logits(torch.from_numpy(hidden)).numpy(), wanted) < TIGHT
            (found,) = case.head.run(None, {"hidden": hidden})
            assert relative(found, wanted) < TOLERANCES["logits_relative"]
    prompts = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        prompts[row, :length] = ids[row][0, :length]
    last = [length - 1 for length in lengths]
    has_cpu_form = (case.folder / CPU_DECODER).exists()
    for for_cpu in (False, True) if has_cpu_form else (False,):
        engine = make_engine(case, for_cpu=for_cpu)
        cache = engine.new_cache(len(lengths), 64)
        inner = case.no_link()
        hidden, _, _ = engine.forward(
            cache, engine.embed(prompts.numpy()), np.zeros(2, np.int64), np.array(last), inner
        )
        for row, length in enumerate(lengths):
            assert relative(hidden[row, :length], expected[row][:length]) < TIGHT
        for step in range(steps):
            at = np.array([length + step for length in lengths])
            tokens = np.array([[int(i[0, p])] for i, p in zip(ids, at, strict=True)])
            hidden, _, _ = engine.forward(
                cache, engine.embed(tokens), at, np.zeros(2, np.int64), inner
            )
            for row, position in enumerate(at):
                assert relative(hidden[row, 0], expected[row][position]) < TIGHT
