"""The decoder in operators of ONNX Runtime's CPU provider computes what the portable one does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from kit.engines import CASES, Exported, make_engine, random_ids, random_link
from recmas_export.backbone_graph import CPU_DECODER, DECODER
from recmas_export.pipeline import cpu_decoder, run_passes
from recmas_runtime.engines.interface import Operands
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import TOLERANCES
from recmas_runtime.sequences.sequence_batch import SequenceBatch

Get = Callable[[str], Exported]

# All but one, whose heads have a width that the operator does not take.
SUITED = [name for name in CASES if name != "qwen3"]
LENGTHS = (9, 4, 7, 12)


@pytest.mark.parametrize("name", CASES)
def test_backbones_that_have_one(exported: Get, name: str) -> None:
    case = exported(name)
    path = case.folder / CPU_DECODER
    assert path.exists() == (name in SUITED)
    if path.exists():
        found = Counter(n.op_type for n in onnx.load(path, load_external_data=False).graph.node)
        assert found["GroupQueryAttention"] == case.backbone.facts.num_layers
        assert not found.keys() & {"Attention", "TensorScatter", "RotaryEmbedding", "Transpose"}


def test_tables_are_not_made_for_a_million_positions(exported: Get) -> None:
    case = exported("llama")
    model = ir.load(case.folder / DECODER)
    before = len(model.graph)
    assert not run_passes(cpu_decoder(max_positions=2**20), model)
    assert len(model.graph) == before


def answers(engine: BackboneEngine, case: Exported, inner: Operands) -> list[Any]:
    """Prefill ragged prompts, think, prefill again behind what is kept, think, write tokens."""
    embeds = case.embed(random_ids(case.backbone, len(LENGTHS), max(LENGTHS)))
    prompts = [row[:n] for row, n in zip(embeds, LENGTHS, strict=True)]
    sequences = SequenceBatch.empty(engine, inner, rows=len(prompts), capacity=64)
    found: list[Any] = []
    for kept in ((0,) * 4, (5, 0, 6, 2)):
        sequences.prefill(prompts, kept)
        found += [sequences.thought, sequences.next_embeds]
        found += engine.rollout(
            sequences.cache,
            sequences.thought,
            sequences.next_embeds,
            sequences.lengths,
            sequences.inner,
            4,
        )
    text = sequences.select([2, 0], keep=True)
    text.feed([[1, 2, 3], [4]])
    return [*found, text.thought, text.lengths]


@pytest.mark.parametrize("name", SUITED)
def test_it_computes_the_same(exported: Get, tmp_path: Any, name: str) -> None:
    """Two agents with links of their own, two samples each; prompts of all lengths, kept or not."""
    case = exported(name)
    width = case.width
    links = (random_link(tmp_path, k, "inner", width, width)[1] for k in ("residual", "projected"))
    inner = stack_operands(list(links))
    portable, for_cpu = (
        answers(make_engine(case, for_cpu=flag), case, inner) for flag in (False, True)
    )
    for wanted, found in zip(portable, for_cpu, strict=True):
        assert np.abs(found - wanted).max() < TOLERANCES["hidden_relative"] * np.abs(wanted).max()
