"""A decoder of two: which of them a call takes, and what they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from kit.engines import Exported, identity_link, make_engine, random_ids, relative
from kit.models import load_tiny
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.bench.engine_worker import weight_bytes, weight_precision
from recmas_export.backbone_graph import CPU_DECODER, export_backbone, prompt_decoder
from recmas_runtime.formats.links import stack_operands


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> TorchBackbone:
    return load_tiny(tmp_path_factory.mktemp("model"), "llama")


def exported(backbone: TorchBackbone, folder: Path, *, with_prompts: bool) -> Exported:
    prompts = prompt_decoder(backbone, precision="int4") if with_prompts else None
    assert (prompts is not None) == with_prompts
    export_backbone(backbone, folder, precision="int4", prompts=prompts)
    return Exported(backbone, folder, was_changed=False)


def hidden(case: Exported, lengths: list[int]) -> list[NDArray[np.float32]]:
    """Return the hidden states of two rows, in calls of such lengths."""
    engine = make_engine(case, for_cpu=True)
    inner = stack_operands([identity_link(case.width)] * 2)
    embeds = engine.embed(random_ids(case.backbone, 2, sum(lengths)).numpy())
    cache, start, found = engine.new_cache(2, 64), 0, []
    for length in lengths:
        part = np.ascontiguousarray(embeds[:, start : start + length])
        at, last = np.full(2, start), np.full(2, length - 1)
        found.append(engine.forward(cache, part, at, last, inner)[0])
        start += length
    return found


def test_prompts_are_exact_and_steps_are_those_of_blocks(
    backbone: TorchBackbone, tmp_path: Path
) -> None:
    both = exported(backbone, tmp_path / "both", with_prompts=True)
    blocks = exported(backbone, tmp_path / "blocks", with_prompts=False)
    ids = random_ids(backbone, 2, 12)
    expected = both.reference(ids)
    (as_prompt,), (coarse,) = hidden(both, [12]), hidden(blocks, [12])
    errors = [relative(found, expected) for found in (as_prompt, coarse)]
    assert errors[0] < errors[1] / 4
    # A call of one position is that of the steps alone, however many rows it has.
    steps, others = (np.concatenate(hidden(case, [1] * 12), axis=1) for case in (both, blocks))
    assert np.array_equal(steps, others)
    assert not np.array_equal(steps, as_prompt)


def test_what_both_read_is_stored_once(backbone: TorchBackbone, tmp_path: Path) -> None:
    case = exported(backbone, tmp_path, with_prompts=True)
    graph = onnx.load(case.folder / CPU_DECODER, load_external_data=False).graph
    (choice,) = (node for node in graph.node if node.op_type == "If")
    branches = {a.name: a.g for a in choice.attribute}
    products = {
        name: {node.op_type for node in branch.node} & {"MatMulIntegerToFloat", "MatMulNBits"}
        for name, branch in branches.items()
    }
    assert products["then_branch"] == {"MatMulIntegerToFloat", "MatMulNBits"}, "rows, and gated"
    assert products["else_branch"] == {"MatMulNBits"}
    assert not any(branch.initializer for branch in branches.values())
    names = [tensor.name for tensor in graph.initializer]
    assert sum("table" in name for name in names) == 2, "cosines and sines"
    # What a step reads is what it reads without the other branch.
    blocks = exported(backbone, tmp_path / "blocks", with_prompts=False).folder / CPU_DECODER
    both = case.folder / CPU_DECODER
    assert weight_bytes(both) == pytest.approx(weight_bytes(blocks), rel=1e-3)
    assert weight_precision(both) == weight_precision(blocks) == "int4"


def test_float32_and_int8_have_one_decoder_for_both(backbone: TorchBackbone) -> None:
    assert prompt_decoder(backbone, precision="float32") is None
    assert prompt_decoder(backbone, precision="int8") is None
    assert prompt_decoder(backbone, precision="int4", decoders=("portable",)) is None
