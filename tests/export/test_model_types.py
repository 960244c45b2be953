"""Model types beyond the families of the other tests: engines, the reference and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from backbones_page import PAGE, page_text
from kit.broken_graphs import behind_kept_rows, change_graph, over_other_rows
from kit.engines import Exported, identity_link, make_engine, random_ids, relative
from kit.measured import largest_difference
from kit.models import load_folder
from kit.zoo import FAST, SEEING, ZOO, write_zoo_model
from recmas_compiler.bench.engine_worker import weight_bytes
from recmas_export.backbone_graph import CPU_DECODER, DECODER, export_backbone
from recmas_export.parity import make_case
from recmas_runtime.checking.parity import measure_backbone_parity
from recmas_runtime.engines.onnx.caches import Cache
from recmas_runtime.formats.precisions import PRECISIONS, TOLERANCES

TIGHT = TOLERANCES["hidden_relative"] / 10


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.families)
        for name in (*ZOO, *SEEING)
    ],
)
def test_engine_reference_and_transformers_agree(
    name: str, tmp_path: Path, figures: dict[str, float]
) -> None:
    """In a ragged batch, past any window, prompt, parts of it and steps, over both decoders."""
    backbone = load_folder(write_zoo_model(tmp_path / "model", name))
    figures[name] = largest_difference(backbone, tmp_path / "graphs")
    assert figures[name] < TIGHT


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
    largest = measured(tmp_path, "helium")
    assert largest() < TIGHT
    model = onnx.load(tmp_path / "graphs" / DECODER, load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type == "RMSNormalization"]
    assert norms
    for norm in norms:
        (epsilon,) = (a for a in norm.attribute if a.name == "epsilon")
        epsilon.f = 0.0
    onnx.save(model, tmp_path / "graphs" / DECODER)
    assert largest() == float("inf")


@pytest.mark.parametrize("spoil", [behind_kept_rows, over_other_rows])
def test_a_case_sees_writes_that_go_wrong(
    tmp_path: Path, spoil: Callable[[onnx.GraphProto], None]
) -> None:
    largest = measured(tmp_path, "llama")
    assert largest() < TIGHT
    change_graph(tmp_path / "graphs" / DECODER, spoil)
    assert largest() > 1e3 * TOLERANCES["hidden_relative"]


@pytest.mark.parametrize("for_cpu", [False, True])
def test_a_case_restores_the_states_that_it_goes_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_cpu: bool
) -> None:
    largest = measured(tmp_path, "qwen3_5_text", for_cpu=for_cpu)
    assert largest() < TIGHT
    monkeypatch.setattr(Cache, "restore_states", lambda *_: None)
    assert largest() > 1e3 * TOLERANCES["hidden_relative"]


def test_a_case_goes_past_a_window_that_can_be_reached(tmp_path: Path) -> None:
    backbone = load_folder(write_zoo_model(tmp_path / "model", "mistral"))
    window = backbone.facts.sliding_window
    assert window is not None
    within, beyond = (
        make_case(backbone, inner=torch.nn.Identity(), capacity=capacity)["lengths"]
        for capacity in (window, window + 1)
    )
    assert within[0].tolist() == [24, 12]
    assert beyond[0].tolist() == [24 + window, 12 + window]
    assert within[1:].tolist() == beyond[1:].tolist()


def measured(root: Path, name: str, *, for_cpu: bool = False) -> Callable[[], float]:
    """Export a backbone; return what gives its case's largest difference as its graphs are then."""
    backbone = load_folder(write_zoo_model(root / "model", name))
    export_backbone(backbone, root / "graphs", decoders=("cpu",) if for_cpu else ())
    inner = identity_link(backbone.facts.width)
    case = make_case(backbone, inner=torch.nn.Identity())

    def largest() -> float:
        exported = Exported(backbone, root / "graphs", was_changed=False)
        engine = make_engine(exported, for_cpu=for_cpu)
        return measure_backbone_parity(engine, case, inner).figures["hidden_relative"]

    return largest


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


def test_a_row_of_the_zoo_is_the_same_model_every_time(tmp_path: Path) -> None:
    """Qwen3.5 draws the decays of its states for itself, wherever torch's generator stands."""
    first, second = (
        write_zoo_model(tmp_path / name, "qwen3_5_text") / "model.safetensors" for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()
