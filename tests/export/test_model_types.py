"""Model types beyond the families of the other tests: engines, the reference and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from backbones_page import PAGE, page_text
from kit.engines import Exported, identity_link, make_engine, random_ids, relative
from kit.models import load_folder
from kit.zoo import FAST, SEEING, ZOO, write_zoo_model
from recmas_compiler.bench.engine_worker import weight_bytes
from recmas_export.backbone_graph import CPU_DECODER, DECODER, export_backbone
from recmas_export.parity import make_case
from recmas_runtime.engines.onnx.backbone import BackboneEngine
from recmas_runtime.engines.onnx.caches import Cache
from recmas_runtime.formats.links import stack_operands
from recmas_runtime.formats.precisions import PRECISIONS, TOLERANCES
from recmas_runtime.running.parity import measure_backbone_parity

TIGHT = TOLERANCES["hidden_relative"] / 10


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.families)
        for name in (*ZOO, *SEEING)
    ],
)
def test_engine_reference_and_transformers_agree(name: str, tmp_path: Path) -> None:
    """In a ragged batch, past any window, prompt, parts of it and steps, over both decoders."""
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
    # zeros fill up the shorter row, as in a run: to a norm without an epsilon they are no numbers
    prompts = np.zeros((len(lengths), max(lengths), case.width), np.float32)
    for row, length in enumerate(lengths):
        prompts[row, :length] = case.embed(ids[row][:, :length])[0]
    has_cpu_form = (case.folder / CPU_DECODER).exists()
    for for_cpu in (False, True) if has_cpu_form else (False,):
        engine = make_engine(case, for_cpu=for_cpu)
        for parts in _PARTS:
            cache = engine.new_cache(len(lengths), 64)
            check_rollout(engine, cache, prompts, expected, ids, parts)


# How many positions of each row a call takes: whole prompts, and parts behind what is kept, of
# which one has none for the shorter row.
_PARTS = (((30, 7),), ((12, 3), (5, 0), (13, 4)))


def check_rollout(
    engine: BackboneEngine,
    cache: Cache,
    prompts: NDArray[np.float32],
    expected: Sequence[NDArray[np.float32]],
    ids: Sequence[torch.Tensor],
    parts: Sequence[tuple[int, ...]],
) -> None:
    """Compare prompts that are run in parts, and steps behind them."""
    inner, at = stack_operands([identity_link(prompts.shape[2])]), np.zeros(len(ids), np.int64)
    for part in parts:
        embeds = np.zeros((len(ids), max(part), prompts.shape[2]), np.float32)
        for row, (start, count) in enumerate(zip(at, part, strict=True)):
            embeds[row, :count] = prompts[row, start : start + count]
        hidden, _, _ = engine.forward(cache, embeds, at, np.array(part) - 1, inner)
        for row, (start, count) in enumerate(zip(at, part, strict=True)):
            wanted = expected[row][start : start + count]
            assert not count or relative(hidden[row, :count], wanted) < TIGHT
        at = at + part
    for _ in range(3):
        tokens = np.array([[int(i[0, p])] for i, p in zip(ids, at, strict=True)])
        hidden, _, _ = engine.forward(
            cache, engine.embed(tokens), at, np.zeros(len(ids), np.int64), inner
        )
        for row, position in enumerate(at):
            assert relative(hidden[row, 0], expected[row][position]) < TIGHT
        at = at + 1


def test_products_with_biases_are_quantized(tmp_path: Path) -> None:
    """Those of GPT-2 are stored as they are multiplied, and have a bias each."""
    backbone = load_folder(write_zoo_model(tmp_path / "model", "gpt2"))
    export_backbone(backbone, tmp_path / "graphs", precision="int8")
    graph = onnx.load(tmp_path / "graphs" / DECODER, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 2 * 4
    assert "Gemm" not in operators
    case = Exported(backbone, tmp_path / "graphs", was_changed=False)
    ids = random_ids(backbone, 1, 20)
    hidden = case.call(case.new_cache(1), case.embed(ids), write_index=[0])["hidden"]
    assert relative(hidden, case.reference(ids)) < PRECISIONS["int8"].tolerances["hidden_relative"]


def test_a_case_sees_what_goes_wrong_between_rows(tmp_path: Path) -> None:
    """A norm whose epsilon is lost is right for every row alone: only what is filled up is not."""
    backbone = load_folder(write_zoo_model(tmp_path / "model", "helium"))
    export_backbone(backbone, tmp_path / "graphs", decoders=())
    inner = identity_link(backbone.facts.width)
    parity_case = make_case(backbone, inner=torch.nn.Identity())

    def largest() -> float:
        case = Exported(backbone, tmp_path / "graphs", was_changed=False)
        parity = measure_backbone_parity(make_engine(case), parity_case, inner)
        return parity.figures["hidden_relative"]

    assert largest() < TIGHT
    model = onnx.load(tmp_path / "graphs" / DECODER, load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    assert norms
    for norm in norms:
        (epsilon,) = (a for a in norm.attribute if a.name == "epsilon")
        epsilon.f = 0.0
    onnx.save(model, tmp_path / "graphs" / DECODER)
    assert largest() == float("inf")


def test_a_step_reads_the_experts_that_it_takes(tmp_path: Path) -> None:
    backbone = load_folder(write_zoo_model(tmp_path / "model", "mixtral"))
    export_backbone(backbone, tmp_path / "graphs")
    facts, config = backbone.facts, backbone.model.config
    experts = facts.num_expert_parameters
    assert experts == 2 * 8 * 3 * 64 * 96
    tables = facts.num_tables * facts.vocab_size * facts.width
    active = facts.num_parameters - tables - experts * 6 // 8
    assert config.num_experts_per_tok == 2
    for file in (DECODER, CPU_DECODER):
        found = weight_bytes(tmp_path / "graphs" / file)
        assert found == pytest.approx(4 * active, rel=0.02), file


def test_the_page_of_backbones_is_that_of_the_tables() -> None:
    assert PAGE.read_text() == page_text(), "run `python tests/export/backbones_page.py`"
